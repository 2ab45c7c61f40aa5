"""From a file to weights, and back.

sources.py     a path, URL or published name -> a file
reading.py     a file -> a checkpoint (formats, safety) -> weights, flags, classes
fitting.py     weights -> a model: names, heads, classes
run_folder.py  the folder of a run: what is saved there, and what is resumed
"""
