"""A trained classifier from any file: its predictions, what it has learnt, and its exports.

classifier.py    a model with its classes and preprocessing, from a checkpoint or exported file
preprocessing.py how an image becomes the input of the model
exported.py      runs exported files; export.py and quantize.py write them
convert.py       converts weights to another format
insight.py       what a network has learnt, tensors in, tensors out; pictures.py draws it
report.py        one HTML page about a run
"""
