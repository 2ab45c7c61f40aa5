"""Files of a run: whole or not at all, rotated, readable without pickle."""

import argparse
import errno
import json
import math
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import PosixPath

import pytest
import torch
from torch import nn

from checkpoints.fitting import load_exactly
from checkpoints.reading import damage_of, read_checkpoint, weights_in
from checkpoints.run_folder import RunFolder, remove_old, save_checkpoint
from config.flags import CheckpointConfig, Config
from runtime.curves import save_curves
from runtime.errors import UserError
from runtime.files import checksum_file


def state(value=1.0):
    return {"model": {"weight": torch.full((2,), value)}, "epoch": 3}


def names(folder, end=""):
    found = {path.name for path in folder.iterdir() if path.name.endswith(end)}
    return sorted(found - {".lock"})


def test_saved_state_is_read_back_without_pickle(tmp_path):
    save_checkpoint(state(), tmp_path / "checkpoint-3.pth")
    loaded = read_checkpoint(tmp_path / "checkpoint-3.pth")
    assert loaded["epoch"] == 3
    torch.testing.assert_close(loaded["model"]["weight"], torch.ones(2))
    assert names(tmp_path) == ["checkpoint-3.pth", "checkpoint-3.pth.sha256"]


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-best.pth"
    save_checkpoint(state(1.0), path)

    def full_disk(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(state(2.0), path)
    assert names(tmp_path) == ["checkpoint-best.pth", "checkpoint-best.pth.sha256"]
    assert damage_of(path) == ""
    torch.testing.assert_close(read_checkpoint(path)["model"]["weight"], torch.ones(2))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_checkpoint_is_one_line(tmp_path, share):
    path = tmp_path / "checkpoint-3.pth"
    save_checkpoint(state(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    for content in ([1, 2], {"weight": [1.0]}, {"model": {"weight": 1}}, {"model": {}}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="has no weights"):
            weights_in(read_checkpoint(tmp_path / "other.pth"), "other.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")
    with pytest.raises(UserError, match="cannot be read.*more than tensors"):
        read_checkpoint(tmp_path / "pickled.pth")
    torch.save({"model": {"weight": torch.ones(10_000)}}, tmp_path / "half.pth")
    os.truncate(tmp_path / "half.pth", 5_000)
    with pytest.raises(UserError, match="cannot be read: it may be truncated"):
        read_checkpoint(tmp_path / "half.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "text.pth")


class Touches:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, zipped, name):
    state = {"model": {"weight": torch.ones(1)}, "args": Touches(tmp_path / "ran")}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with (tmp_path / name).open("rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "checkpoint-3.pth"
    save_checkpoint(state(), path)
    data = bytearray(path.read_bytes())
    place = data.find(torch.ones(2).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["epoch"] == 3  # torch does not notice
    with pytest.raises(UserError, match="differs from its checksum.*remove .*pth.sha256"):
        read_checkpoint(path)
    checksum_file(path).unlink()
    read_checkpoint(path)


def test_small_files_that_would_fill_the_memory_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.pth"
    torch.save({"model": {"weight": torch.zeros(2**20)}}, tmp_path / "stored.pth")
    stored = zipfile.ZipFile(tmp_path / "stored.pth")
    with stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(torch, "load", pytest.fail)
    with pytest.raises(UserError, match=r"bytes unpack to 4,19\d,\d+"):
        read_checkpoint(path)


def test_a_file_far_larger_than_the_model_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.pth"
    torch.save({"model": {"weight": torch.zeros(2**23)}}, path)  # 32 MiB
    assert len(read_checkpoint(path, nn.Linear(1000, 1000))["model"]) == 1
    monkeypatch.setattr(torch, "load", pytest.fail)
    with pytest.raises(UserError, match=r"another model: it takes 33,55\d,\d+ bytes, the model 8"):
        read_checkpoint(path, nn.Linear(1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    weights = {"weight": torch.tensor([[1.0, value]]), "bias": torch.ones(1)}
    with pytest.raises(UserError, match="w.pth can't be used: not finite: weight"):
        load_exactly(model, weights, "w.pth")
    torch.testing.assert_close(model.weight, before)


def test_flags_of_released_checkpoints_are_read(tmp_path):
    args = argparse.Namespace(model="hornet_tiny_7x7", output_dir=PosixPath("/a/b"))
    torch.save({"model": {"weight": torch.ones(2)}, "args": args}, tmp_path / "released.pth")
    assert read_checkpoint(tmp_path / "released.pth")["args"] == args


def test_weights_that_do_not_fit_are_listed():
    model = nn.Linear(2, 2)
    with pytest.raises(UserError) as caught:
        load_exactly(model, {"weight": torch.ones(3, 2), "extra": torch.ones(1)}, "f")
    message = str(caught.value)
    assert "lacks bias" in message
    assert "unknown extra" in message
    assert "another shape of weight ([3, 2] instead of [2, 2])" in message


def test_rotation_keeps_the_newest_and_every_fiftieth(tmp_path):
    for epoch in (0, 9, 49, 50, 99, 100, 101, 102):
        (tmp_path / f"checkpoint-{epoch}.pth").touch()
    for other in ("checkpoint-best.pth", "checkpoint-start.pth", "checkpoint-x1.pth"):
        (tmp_path / other).touch()
    remove_old(tmp_path, keep=2)
    kept = [f"checkpoint-{name}.pth" for name in (100, 101, 102, 50, "best", "start", "x1")]
    assert names(tmp_path) == kept


@pytest.mark.parametrize("restarted", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_what_a_run_starts_from(tmp_path, monkeypatch, restarted):
    def start(**flags):
        config = CheckpointConfig(output_dir=str(tmp_path), **flags)
        return RunFolder(config, is_main=True).to_resume()

    assert start() == ""
    for name in ("9", "10", "10-90", "9-85", "11-101", "best", "start"):
        save_checkpoint(state(), tmp_path / f"checkpoint-{name}.pth")
    assert start() == str(tmp_path / "checkpoint-11-101.pth")
    (tmp_path / "checkpoint-11-101.pth").unlink()
    assert start() == str(tmp_path / "checkpoint-10.pth")
    assert start(auto_resume=False) == ""
    assert start(resume="other.pth") == "other.pth"
    monkeypatch.setenv(restarted, "1")
    assert start(resume="other.pth") == str(tmp_path / "checkpoint-10.pth")
    assert start(resume="other.pth", auto_resume=False) == "other.pth"


@pytest.mark.parametrize("checked", [True, False])
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, checked):
    """torch.load takes a flipped byte without a word; without a checksum only what fails to load
    is known."""
    for epoch in range(4):
        save_checkpoint(state(), tmp_path / f"checkpoint-{epoch}.pth")
        if not checked:
            (tmp_path / f"checkpoint-{epoch}.pth.sha256").unlink()
    content = (tmp_path / "checkpoint-3.pth").read_bytes()
    (tmp_path / "checkpoint-3.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "checkpoint-2.pth").write_bytes(b"")
    flipped = bytearray(content)
    place = flipped.index(torch.ones(2).numpy().tobytes())
    flipped[place] ^= 1
    (tmp_path / "checkpoint-1.pth").write_bytes(flipped)
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    expected = "checkpoint-0.pth" if checked else "checkpoint-1.pth"
    assert folder.to_resume() == str(tmp_path / expected)
    assert caplog.text.count("skipped ") == (3 if checked else 2)


def test_a_best_checkpoint_is_the_last_resort(tmp_path, caplog):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    for epoch, name in ((3, "3"), (1, "best"), (2, "best-ema")):
        folder.save(state() | {"epoch": epoch}, name)
    assert folder.to_resume().endswith("checkpoint-3.pth")
    for name, expected in (("3", "-best-ema.pth"), ("best-ema", "-best.pth"), ("best", "")):
        (tmp_path / f"checkpoint-{name}.pth").write_bytes(b"damaged")
        assert folder.to_resume().endswith(expected)
    assert folder.to_resume() == ""
    assert "can be read: the run starts over" in caplog.text


def test_a_full_disk_is_known_before_a_byte_is_written(tmp_path, monkeypatch):
    save_checkpoint(state(1.0), tmp_path / "checkpoint-best.pth")
    usage = shutil.disk_usage(tmp_path)._replace(free=4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(torch, "save", None)
    with pytest.raises(UserError, match="it takes 8 bytes, 4 are free"):
        save_checkpoint(state(2.0), tmp_path / "checkpoint-best.pth")
    assert read_checkpoint(tmp_path / "checkpoint-best.pth")["model"]["weight"][0] == 1


def test_files_inside_epochs_make_room(tmp_path):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    folder.save(state(), "best-ema")
    for step in (5, 10, 15):
        folder.save_step(state(), 0, step)
    inside = ["checkpoint-0-10.pth", "checkpoint-0-15.pth"]
    assert names(tmp_path, ".pth") == [*inside, "checkpoint-best-ema.pth"]
    folder.save_epoch(state(), 0, is_last=False)
    left = ["checkpoint-0.pth", "checkpoint-best-ema.pth"]
    assert names(tmp_path) == sorted([*left, *(f"{name}.sha256" for name in left)])


def test_epochs_that_are_repeated_leave_the_log(tmp_path):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    for epoch in range(3):
        folder.log({"epoch": epoch})
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 0, "tra')
    folder.set_aside("", 1)
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    assert (tmp_path / "forgotten/1/log.txt").read_text() == '{"epoch": 2}\n{"epoch": 0, "tra\n'


@pytest.mark.parametrize(
    ("resume_from", "epoch", "left"),
    [
        ("", -1, []),
        ("checkpoint-2.pth", 2, ["checkpoint-1.pth", "checkpoint-2.pth"]),
        ("checkpoint-3-9.pth", 2, ["checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-3-9.pth"]),
        ("/elsewhere/w.pth", 1, ["checkpoint-1.pth"]),
    ],
)
def test_a_run_that_goes_back_sets_aside_what_came_after(tmp_path, resume_from, epoch, left):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path), save_ckpt_num=1), is_main=True)
    for name in ("1", "2", "3-9", "4"):
        folder.save(state(), name)
    folder.set_aside(resume_from and str(tmp_path / resume_from), epoch)
    assert names(tmp_path, ".pth") == left
    assert len(names(tmp_path / "forgotten/1", ".pth")) == 4 - len(left)
    folder.save_epoch(state(), epoch + 1, is_last=False)
    assert folder.to_resume() == str(tmp_path / f"checkpoint-{epoch + 1}.pth")


def test_best_checkpoints_of_the_way_that_is_left_are_set_aside_each_time(tmp_path):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    for occasion in ("1", "2"):
        for epoch in (1, 2, 3):
            folder.save(state() | {"epoch": epoch}, str(epoch))
        folder.save(state() | {"epoch": 1}, "best")
        folder.save(state() | {"epoch": 3}, "best-ema")
        folder.set_aside(str(tmp_path / "checkpoint-1.pth"), 1)
        assert names(tmp_path, ".pth") == ["checkpoint-1.pth", "checkpoint-best.pth"]
        aside = tmp_path / "forgotten" / occasion
        left = ["checkpoint-2.pth", "checkpoint-3.pth", "checkpoint-best-ema.pth"]
        assert names(aside, ".pth") == left
        assert not any(damage_of(aside / name) for name in left)


def test_a_run_that_saves_nothing_removes_nothing(tmp_path):
    for name in ("1", "2-5", "2-7", "2-9"):
        save_checkpoint(state(), tmp_path / f"checkpoint-{name}.pth")
    before = names(tmp_path)
    config = CheckpointConfig(output_dir=str(tmp_path), save_ckpt=False, save_ckpt_num=1)
    folder = RunFolder(config, is_main=True)
    folder.save_step(state(), 2, 11)
    folder.save_epoch(state(), 2, is_last=True)
    assert names(tmp_path) == before


def test_with_another_batch_the_newest_file_is_not_the_one_of_most_steps(tmp_path):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    for step in (990, 1000, 510):
        folder.save_step(state(), 5, step)
        os.utime(tmp_path / f"checkpoint-5-{step}.pth", ns=(0, len(names(tmp_path))))
    assert names(tmp_path, ".pth") == ["checkpoint-5-1000.pth", "checkpoint-5-510.pth"]


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    done = []
    replace, fsync = pathlib.Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("flush") or fsync(fd))
    monkeypatch.setattr(
        pathlib.Path, "replace", lambda path, to: done.append(to.suffix) or replace(path, to)
    )
    save_checkpoint(state(), tmp_path / "checkpoint-3.pth")
    assert done[:2] == ["flush", ".pth"]
    assert done[-3:] == ["flush", ".sha256", "flush"]


@pytest.mark.parametrize("refused", [stat.S_ISDIR, stat.S_ISREG])
def test_only_a_flush_of_files_has_to_work(tmp_path, monkeypatch, refused):
    """Some network file systems cannot flush folders."""

    def fsync(descriptor):
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if refused is stat.S_ISDIR else pytest.raises(UserError, match="Invalid"):
        save_checkpoint(state(), tmp_path / "checkpoint-3.pth")
    assert (tmp_path / "checkpoint-3.pth").exists() == (refused is stat.S_ISDIR)


def test_bare_weights_and_an_average_alone(tmp_path):
    weights = {"weight": torch.ones(1)}
    for content in (weights, {"model_ema": weights, "epoch": 1}):
        torch.save(content, tmp_path / "w.pth")
        assert weights_in(read_checkpoint(tmp_path / "w.pth"), "w.pth") == weights


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_in_released_flags_whatever_python_wrote_them(tmp_path, monkeypatch, module):
    """Python 3.13 has moved their class to pathlib._local."""
    flags = {"output_dir": PosixPath("logs")}
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    monkeypatch.setattr(PosixPath, "__module__", module)
    torch.save({"model": {"w": torch.ones(1)}, "args": flags}, tmp_path / "w.pth")
    assert module.encode() in (tmp_path / "w.pth").read_bytes()
    assert read_checkpoint(tmp_path / "w.pth")["args"] == flags


def test_what_a_killed_save_has_left_is_removed(tmp_path):
    save_checkpoint(state(), tmp_path / "checkpoint-3.pth")
    (tmp_path / ".checkpoint-4.pth.77.tmp").mkdir()
    (tmp_path / ".checkpoint-4.pth.77.tmp/checkpoint-4.pth").write_bytes(b"half")
    RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True).begin(Config())
    assert names(tmp_path) == ["checkpoint-3.pth", "checkpoint-3.pth.sha256", "config.yaml"]


WRITES = """
import sys, time
from config.flags import CheckpointConfig
from checkpoints.run_folder import RunFolder
with RunFolder(CheckpointConfig(output_dir=sys.argv[1]), is_main=True).claimed():
    print("writes", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, monkeypatch, caplog):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    with subprocess.Popen([sys.executable, "-c", WRITES, tmp_path], stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"writes\n"
        refused = pytest.raises(UserError, match=rf"another run writes .*process {run.pid} on ")
        with refused, folder.claimed():
            pass
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_RESTART_COUNT", "1")
            with folder.claimed():
                assert "cannot be locked against other runs" in caplog.text
        run.kill()
    for _ in range(2):
        with folder.claimed():
            pass


def test_numbers_that_are_none_leave_the_log_readable(tmp_path):
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path)), is_main=True)
    folder.log({"epoch": 0, "train_loss": math.nan, "test_loss": -math.inf, "test_acc1": 1.5})
    line = json.loads((tmp_path / "log.txt").read_text(), parse_constant=pytest.fail)
    assert line == {"epoch": 0, "train_loss": None, "test_loss": None, "test_acc1": 1.5}
    assert save_curves(tmp_path).is_file()


def test_only_the_main_process_writes(tmp_path):
    config = CheckpointConfig(output_dir=str(tmp_path / "run"))
    folder = RunFolder(config, is_main=False)
    with folder.claimed():
        folder.begin(Config())
    folder.log({"epoch": 0})
    folder.save(state(), "best")
    folder.save_epoch(state(), 0, is_last=True)
    assert names(tmp_path / "run") == []


def test_save_frequency_and_last_epoch(tmp_path):
    config = CheckpointConfig(output_dir=str(tmp_path), save_ckpt_freq=2)
    folder = RunFolder(config, is_main=True)
    for epoch in range(3):
        folder.save_epoch(state(), epoch, is_last=epoch == 2)
    assert names(tmp_path, ".pth") == ["checkpoint-1.pth", "checkpoint-2.pth"]
    folder.log({"epoch": 2})
    assert json.loads((tmp_path / "log.txt").read_text()) == {"epoch": 2}


def test_unwritable_output_dir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    folder = RunFolder(CheckpointConfig(output_dir=str(tmp_path / "file" / "run")), is_main=True)
    with pytest.raises(UserError, match="--output_dir"), folder.claimed():
        pass
