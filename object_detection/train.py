"""Train a detector: python -m object_detection.train CONFIG ..."""

import sys

from dense.run import main

if __name__ == "__main__":
    sys.exit(main("object_detection", "train"))
