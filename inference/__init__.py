"""A trained classifier out of any file: what it answers, what it has learnt, and its exports.

classifier.py a model with its classes and preprocessing, out of a checkpoint or an exported file
exported.py   running exported files; export.py and quantize.py write them
convert.py    the weights in another form
insight.py    what a network has learnt, tensors in, tensors out; pictures.py draws it
report.py     one HTML page about a run
"""
