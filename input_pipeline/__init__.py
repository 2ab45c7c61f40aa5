"""From files to batches.

image_sets.py     what a data set has to provide, and those of folders and torchvision
timm_sets.py      data sets that timm reads: tar files, WebDataset, Hugging Face, TensorFlow
hugging_face.py, timm_patches.py   what those need of other packages
digits.py         scikit-learn's handwritten digits as image folders
images.py         reading an image file
transforms.py     from an image to the network's input
unreadable.py     the list of images that cannot be read
loaders.py        samplers and loaders: which rank sees which images in which order
"""
