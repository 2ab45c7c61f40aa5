"""log.txt read back, curves drawn, numbers sent to trackers."""

import json
import sys
import time

import pytest
import wandb
from PIL import Image

from config.command_line import parse_args
from runtime.curves import save_curves
from runtime.errors import UserError
from runtime.logging import read_log
from runtime.trackers import Trackers


def test_log_is_read_in_order_with_the_last_record_of_a_repeated_epoch(tmp_path):
    lines = [
        {"epoch": e, "train_loss": loss, "train_lr": 1, "train_min_lr": 1}
        for e, loss in ((0, 3.0), (1, 9.0), (1, 2.0))
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"epoch": 2, "tra'
    (tmp_path / "log.txt").write_text(text)
    assert read_log(tmp_path) == [lines[0], lines[2]]
    assert save_curves(tmp_path) == tmp_path / "curves.png"
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


def config_of(*flags):
    return parse_args([str(flag) for flag in flags])


def test_unwritable_log_dir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    config = config_of("--log_dir", tmp_path / "file" / "events")
    with pytest.raises(UserError, match="--log_dir"):
        Trackers(config.logging.log_dir, config.wandb_options(), is_main=True)
    Trackers(config.logging.log_dir, config.wandb_options(), is_main=False).write({"a": 1.0}, 0)


def test_wandb_gets_numbers_and_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ["--enable_wandb", "true", "--project", "p1", "--exp_name", "e1", "--lr", "0.0123"]
    config = config_of(*flags, "--output_dir", tmp_path)
    trackers = Trackers(config.logging.log_dir, config.wandb_options(), is_main=True)
    trackers.write({"test_acc1": 12.625}, 7)
    (tmp_path / "checkpoint-best.pth").write_text("weights")
    trackers.finish([tmp_path / "checkpoint-best.pth"])
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # another process writes the file
    while b"checkpoint-best.pth" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    content = file.read_bytes()
    for part in (b"p1", b"e1", b"test_acc1", b"12.625", b"0.0123", b"checkpoint-best.pth"):
        assert part in content, part


def test_wandb_without_the_package_or_a_login_is_one_line(tmp_path, monkeypatch):
    config = config_of("--enable_wandb", "true", "--output_dir", tmp_path)
    assert Trackers(config.logging.log_dir, config.wandb_options(), is_main=False).wandb is None
    wandb.teardown()  # it has read the environment once and for all
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="--enable_wandb true: .*WANDB_MODE=offline") as caught:
        Trackers(config.logging.log_dir, config.wandb_options(), is_main=True)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Trackers(config.logging.log_dir, config.wandb_options(), is_main=True)
