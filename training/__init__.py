"""What training works with.

state.py      TrainState: all that changes during training and stands in a checkpoint
build.py      the model, the start of a TrainState, and the TrainSetup, which stays the same
metrics.py    running sums of loss, accuracy and gradient norm
nonfinite.py  steps whose gradient has NaN or inf: skipped, counted, and ended by an error
saving.py     checkpoints inside an epoch, and stopping by a signal
"""
