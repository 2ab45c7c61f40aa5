"""Predict by a detector: python -m object_detection.predict CONFIG CHECKPOINT IMAGES ..."""

from dense.predict import main

if __name__ == "__main__":
    raise SystemExit(main("object_detection"))
