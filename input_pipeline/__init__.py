"""From files to batches.

image_sets.py   the interface of data sets; class folders and torchvision's data sets
timm_sets.py    data sets that timm reads: tar files, WebDataset, Hugging Face, TensorFlow
hugging_face.py, timm_patches.py   workarounds for these
digits.py       scikit-learn's handwritten digits as class folders
images.py       image files -> images
transforms.py   images -> inputs of the model
unreadable.py   the list of unreadable images
loaders.py      samplers and loaders: which rank loads which images in which order
"""
