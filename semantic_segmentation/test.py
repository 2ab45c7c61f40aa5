"""Test a segmentor: python -m semantic_segmentation.test CONFIG CHECKPOINT ..."""

from dense.run import main

if __name__ == "__main__":
    raise SystemExit(main("semantic_segmentation", "test"))
