"""The jitted path: one forward pass in few steps, timed, and text sampled from it."""
