"""Pre-training: draw a grid, take an update, log, evaluate, save; resume where it stopped."""
