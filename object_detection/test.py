"""Test a detector: python -m object_detection.test CONFIG CHECKPOINT ..."""

from dense.run import main

if __name__ == "__main__":
    raise SystemExit(main("object_detection", "test"))
