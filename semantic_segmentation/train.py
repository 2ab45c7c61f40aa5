"""Train a segmentor: python -m semantic_segmentation.train CONFIG ..."""

from dense.run import main

if __name__ == "__main__":
    raise SystemExit(main("semantic_segmentation", "train"))
