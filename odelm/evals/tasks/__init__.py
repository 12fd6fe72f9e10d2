"""Zero-shot tasks from local files in the formats that they are published in, scored at each step count."""
