"""Predict by a segmentor: python -m semantic_segmentation.predict CONFIG CHECKPOINT IMAGES ..."""

from dense.predict import main

if __name__ == "__main__":
    raise SystemExit(main("semantic_segmentation"))
