"""Fine-tuning on one's own folder, from a checkpoint of other classes."""

import json
import re

import pytest
import torch

import main
from checkpoints.reading import read_checkpoint
from config.command_line import parse_args
from runtime.errors import UserError
from tests.drawings import CLASSES, write_drawings
from tests.integration.conftest import ROOT, launch

RECIPE = str(ROOT / "recipes/finetune.yaml")
SMALL = ["--input_size", "32", "--num_workers", "0", "--device", "cpu"]


def run(*flags):
    main.run(parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def ten_digits(tmp_path_factory):
    """A checkpoint of ten classes, and of a network that no flag of the fine-tuning names."""
    folder = tmp_path_factory.mktemp("digits")
    run(
        *("--config", ROOT / "recipes/digits.yaml", "--data_path", folder / "data"),
        *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--max_images", "128"),
        *("--epochs", "1", "--warmup_epochs", "0", "--output_dir", folder / "run"),
    )
    return folder / "run/checkpoint-0.pth"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return write_drawings(tmp_path_factory.mktemp("drawings") / "mine", 20)


def test_recipe_on_one_folder(ten_digits, drawings, tmp_path, capsys):
    flags = ["--config", RECIPE, *SMALL, "--data_path", drawings, "--epochs", "2"]
    flags += ["--output_dir", tmp_path]
    run(*flags, "--finetune", ten_digits)
    out = capsys.readouterr().out
    assert "model hornet_atto_7x7, as" in out
    held_out = re.search(r"(\d+) of the 60 images of", out)[1]
    assert 6 <= int(held_out) <= 18
    assert "a new head: 10 classes in the file, 3 here" in out
    assert "learning rate 0.00025 for a total batch of 32" in out
    assert "no mixup" in out
    state = read_checkpoint(tmp_path / "checkpoint-1.pth")
    assert state["classes"] == list(CLASSES)
    assert len(state["model"]["head.bias"]) == 3
    assert state["args"]["model"] == "hornet_atto_7x7"
    assert state["args"]["model_kwargs"] == {"base_dim": 16, "depths": [1, 1, 1, 1]}
    # evaluated again, on the same held-out images
    record = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    run(*flags, "--eval", "true", "--resume", tmp_path / "checkpoint-1.pth")
    assert f"test on {held_out} images: top-1 {record['test_acc1']:.2f}%" in capsys.readouterr().out
    # and continued by the same command, where the start weights are gone
    run(*flags, "--epochs", "3", "--finetune", "gone.pth")
    assert "checkpoint-1.pth at epoch 2" in capsys.readouterr().out


def test_frozen_backbone(ten_digits, drawings, tmp_path):
    run(
        *("--config", RECIPE, *SMALL, "--data_path", drawings, "--epochs", "1"),
        *("--finetune", ten_digits, "--freeze", "(?!head)", "--output_dir", tmp_path),
        *("--grad_checkpointing", "true", "--model_ema", "true"),
    )
    start = read_checkpoint(ten_digits)["model"]
    end = read_checkpoint(tmp_path / "checkpoint-0.pth")["model"]
    assert all(torch.equal(end[name], start[name]) for name in start if "head" not in name)


def test_mistakes_are_one_line(ten_digits, drawings, tmp_path):
    flags = ["--config", RECIPE, *SMALL, "--data_path", drawings]
    with pytest.raises(UserError, match="--model auto needs weights that name it"):
        run(*flags)
    weights = read_checkpoint(ten_digits)["model"]
    torch.save(weights, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not name its model: give --model"):
        run(*flags, "--finetune", tmp_path / "bare.pth")
    with pytest.raises(UserError, match="no training.*fill one batch|lower --batch_size"):
        run(*flags, "--finetune", ten_digits, "--batch_size", "64")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="needs one folder of images per class"):
        run(*flags, "--finetune", ten_digits, "--data_path", tmp_path / "empty")


@pytest.mark.slow
def test_published_recipe_learns_drawings(tmp_path):
    """From ten digits to three shapes: better than the same run without the digits."""
    digits = [*("--config", "recipes/digits.yaml", "--epochs", "8")]
    digits += ["--data_path", tmp_path / "d"]
    assert launch("main.py", *digits, "--output_dir", tmp_path / "a").returncode == 0
    drawings = write_drawings(tmp_path / "drawings", 60)
    accuracy = []
    for start in (["--finetune", tmp_path / "a/checkpoint-7.pth"], ["--model", "hornet_atto_7x7"]):
        out = tmp_path / f"run{len(accuracy)}"
        flags = ["--config", RECIPE, *SMALL, "--data_path", drawings, "--output_dir", out]
        flags += ["--epochs", "15"]
        done = launch("main.py", *flags, *start)
        assert done.returncode == 0, done.stderr
        record = json.loads((out / "log.txt").read_text().splitlines()[-1])
        accuracy.append(record["test_acc1"])
    # 88.6 and 62.9, of 35 images, with seed 0 and half of the recipe's epochs
    assert accuracy[0] >= 85
    assert accuracy[0] > accuracy[1] + 10
