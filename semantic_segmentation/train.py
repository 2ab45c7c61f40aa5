"""Train a segmentor: python -m semantic_segmentation.train CONFIG ..."""

import sys

from dense.run import main

if __name__ == "__main__":
    sys.exit(main("semantic_segmentation", "train"))
