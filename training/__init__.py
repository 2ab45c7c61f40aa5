"""The parts of a training run.

state.py      TrainState: everything that changes, and so is saved in checkpoints
loss.py       the loss, with weights of classes
distillation.py   the loss against a teacher
build.py      the model, the initial TrainState, and the constant TrainSetup
nonfinite.py  skipped steps, whose gradient has NaN or inf
saving.py     when checkpoints are saved, and what a signal does
"""
