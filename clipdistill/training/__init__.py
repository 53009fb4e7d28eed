"""The training loop: state, checkpoints, schedule, batches."""
