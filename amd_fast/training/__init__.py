"""Training: configuration, batches, loop, checkpoints."""
