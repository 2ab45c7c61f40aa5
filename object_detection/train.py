"""Train a detector: python -m object_detection.train CONFIG ..."""

from dense.run import main

if __name__ == "__main__":
    raise SystemExit(main("object_detection", "train"))
