"""Test a segmentor: python -m semantic_segmentation.test CONFIG CHECKPOINT ..."""

import sys

from dense.run import main

if __name__ == "__main__":
    sys.exit(main("semantic_segmentation", "test"))
