"""What coarse steps cost and save: losses against latencies, and the report of them."""
