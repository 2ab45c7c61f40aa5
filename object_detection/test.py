"""Test a detector: python -m object_detection.test CONFIG CHECKPOINT ..."""

import sys

from dense.run import main

if __name__ == "__main__":
    sys.exit(main("object_detection", "test"))
