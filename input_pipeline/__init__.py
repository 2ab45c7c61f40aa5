"""From files to batches.

image_sets.py   the interface of data sets; images of a listing, and torchvision's data sets
parts.py        which folders hold training and which evaluation images
folders.py, tar_files.py   which images there are, in which classes
listing.py      the images as a few arrays; which of them are held out
timm_sets.py    data sets that timm reads: WebDataset, Hugging Face, TensorFlow
hugging_face.py, timm_patches.py   workarounds for these
packing.py      smaller copies of class folders, in large files
digits.py       scikit-learn's handwritten digits as class folders
label_files.py  images with any number of classes each, from CSV and JSON files
images.py, arrays.py   image files -> images of Pillow, or tensors of other channels and values
transforms.py   images -> inputs of the model
unreadable.py   the list of unreadable images
loaders.py      samplers and loaders: which rank loads which images in which order
"""
