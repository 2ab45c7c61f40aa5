"""The home of "file to weights", for every tool, tree and trainer.

checksums.py  the checksum beside each file
reading.py    what a checkpoint file holds: formats, and which of it is safe to read
fitting.py    weights into a model: names, heads, classes
sources.py    the file behind a path, an address or a published name
run_folder.py the folder of a run: what is saved there, and what it resumes from
"""
