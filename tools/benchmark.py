"""The same as `python -m benchmarks`, under its older name."""

import sys

from benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
