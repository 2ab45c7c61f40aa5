"""log.txt read back, curves drawn, numbers sent to trackers."""

import json
import struct
import sys
import time
from unittest.mock import Mock

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from config.command_line import parse_args
from runtime.curves import save_curves
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError
from runtime.logging import EpochTimer, read_log
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


def test_an_epoch_is_timed_from_where_it_was_resumed(monkeypatch):
    clock = iter([10.0, 14.0, 15.5, 20.0, 20.5, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = EpochTimer(SINGLE_PROCESS)
    timer.start(0)
    timer.end_training(80)
    record = timer.record(3)
    assert record.pop("device")
    assert record == {"epoch": 3, "seconds": 5.5, "train_images_per_s": 20, "processes": 1}
    timer.start(64)
    timer.end_training(80)
    assert timer.record(4).keys() == {"epoch", "seconds", "device", "processes"}


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


def values_in_tensorboard(folder, tag):
    """Step and value of each point that TensorBoard shows."""
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def records_of(content):
    """The records in a file of wandb: LevelDB's log format, after 7 bytes."""
    place, record, block = 7, b"", 2**15
    while place + 7 <= len(content):
        if block - place % block < 7:  # too little for a head
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def values_in_wandb(folder, tag):
    """Step and value of each point in the files of all starts, by the id of their run."""
    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            assert not items or len([name for name in items if name[0] != "_"]) > 0
            if tag in items:
                points = found.setdefault(file.stem.removeprefix("run-"), [])
                points.append((int(items["_step"]), float(items[tag])))
    return found


def trackers_of(folder, step, **options):
    config = config_of("--enable_wandb", "true", "--output_dir", folder)
    return Trackers(
        str(folder / "events"), config.wandb_options(), True, str(folder), step, **options
    )


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_resumed_run_has_one_curve(tmp_path, offline):
    first = trackers_of(tmp_path, 0)
    for step in range(1, 8):
        first.write({"loss": float(step)}, step)
    first.finish([])
    again = trackers_of(tmp_path, 4)  # the checkpoint was older
    assert again.wandb_id == first.wandb_id
    for step in range(5, 10):
        again.write({"loss": float(step)}, step)
        if step == 7:  # which the first start has not reached
            again.write({"test_acc1": 50.0}, step)
    again.finish([])
    expected = [(step, float(step)) for step in range(1, 10)]
    assert values_in_tensorboard(tmp_path / "events", "loss") == expected
    assert values_in_wandb(tmp_path, "loss") == {first.wandb_id: expected}
    assert values_in_wandb(tmp_path, "test_acc1") == {first.wandb_id: [(7, 50.0)]}
    (tmp_path / "trackers.json").unlink()  # then the checkpoint tells the run
    other = trackers_of(tmp_path, 9, wandb_id=first.wandb_id)
    assert other.wandb_id == first.wandb_id
    other.finish([])


def test_a_kill_while_tensorboard_gets_values_loses_none(tmp_path, monkeypatch):
    def trackers(step):
        return Trackers(str(tmp_path / "events"), None, True, str(tmp_path), step)

    first = trackers(0)
    first.write({"train/loss": 1.0}, 6)
    with monkeypatch.context() as patch:  # stands for a kill: nothing after it runs
        patch.setattr(first.tensorboard, "add", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.write({"test_acc1": 50.0}, 6)
    again = trackers(6)  # saved before the evaluation
    again.write({"test_acc1": 50.0}, 6)
    again.finish([])
    assert values_in_tensorboard(tmp_path / "events", "train/loss") == [(6, 1.0)]
    assert values_in_tensorboard(tmp_path / "events", "test_acc1") == [(6, 50.0)]


def test_steps_of_another_length(tmp_path, offline):
    first = trackers_of(tmp_path, 0, steps_per_epoch=10)
    for step in range(1, 9):
        first.write({"loss": float(step)}, step)
    first.finish([])
    other = trackers_of(tmp_path, 4, steps_per_epoch=5)  # twice the batch
    other.write({"loss": -1.0}, 5)
    other.finish([])
    assert len(values_in_tensorboard(tmp_path / "events", "loss")) == 9
    assert values_in_wandb(tmp_path, "loss")[other.wandb_id] == [(5, -1.0)]


def test_a_kill_before_the_first_line_keeps_the_new_run(tmp_path, offline):
    first = trackers_of(tmp_path, 0)
    first.write({"loss": 1.0}, 9)
    first.finish([])
    back = trackers_of(tmp_path, 3, went_back=True)
    back.finish([])
    again = trackers_of(tmp_path, 3)
    assert again.wandb_id == back.wandb_id
    again.write({"loss": 2.0}, 5)  # before the last step of the first run
    again.finish([])
    assert values_in_wandb(tmp_path, "loss")[again.wandb_id] == [(5, 2.0)]


def test_what_a_run_that_goes_back_has_left_is_not_shown(tmp_path, offline, caplog):
    first = trackers_of(tmp_path, 0)
    for step in range(1, 8):
        first.write({"loss": float(step)}, step)
    first.finish([])
    back = trackers_of(tmp_path, 3, went_back=True)
    for step in range(4, 6):
        back.write({"loss": -1.0}, step)
    back.finish([])
    shown = values_in_tensorboard(tmp_path / "events", "loss")
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -1.0), (5, -1.0)]
    assert values_in_wandb(tmp_path, "loss")[back.wandb_id] == [(4, -1.0), (5, -1.0)]
    assert back.wandb_id != first.wandb_id
    assert f"the run {first.wandb_id} stays as it is" in caplog.text
    fresh = trackers_of(tmp_path, 0)  # starts over in the same folder
    fresh.finish([])
    assert fresh.wandb_id not in (first.wandb_id, back.wandb_id)
    assert values_in_tensorboard(tmp_path / "events", "loss") == []


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
