"""Every kind of config builds its model and data, and takes a step of training and evaluation."""

import ast
import re
from pathlib import Path

import pytest

from dense.run import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for path in ROOT.glob("*/configs/*/*.py")
    if path.parent.name != "_base_"
    # made small, they differ from HorNet-T's in numbers only, which test_configs.py checks
    and not (path.parent.name == "hornet" and re.search("hornet_(small|base)_", path.name))
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_evaluates(path, tmp_path, monkeypatch):
    texts = []

    def format_code(text, **_):
        ast.parse(text)
        texts.append(text)
        return text, False

    monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", format_code)
    work = ["--smoke", "--work-dir", str(tmp_path / "work")]
    assert main(path.relative_to(ROOT).parts[0], "train", [str(path), *work]) == 0
    assert list((tmp_path / "work-smoke").glob("*_[12].pth"))
    assert 0 < len(texts) == len(set(texts))  # yapf is slow: no text twice
