"""Every config builds its model and its data, and takes a step of training and of evaluation."""

from pathlib import Path

import pytest

from dense.run import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in ROOT.glob("*/configs/*/*.py") if p.parent.name != "_base_")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_evaluates(path, tmp_path):
    work = ["--smoke", "--work-dir", str(tmp_path / "work")]
    assert main(path.relative_to(ROOT).parts[0], "train", [str(path), *work]) == 0
    assert list((tmp_path / "work-smoke").glob("*_[12].pth"))
