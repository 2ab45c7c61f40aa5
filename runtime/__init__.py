"""What a run needs around the training: processes, checkpoints, logs."""
