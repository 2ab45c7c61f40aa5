"""Packed copies of data sets: the same images, classes and labels, smaller."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image

from config.command_line import parse_args
from datasets import build_data
from input_pipeline import packing
from input_pipeline.images import load_image
from input_pipeline.packing import Packing, packed
from runtime.errors import UserError
from tools.pack import main

NAMES = {"a": "cat", "b": "dog"}


def photo(seed, size=(60, 90)):
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def source(tmp_path):
    """train/ and val/ of cats and dogs: large JPEGs, and some of other kinds."""
    root = tmp_path / "source"
    for part, count in (("train", 7), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                photo(10 * index + label).save(folder / f"{index}.jpg", quality=95)
    special = root / "train" / "cat" / "more"
    special.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(1).save(special / "turned.jpg", exif=turned)
    photo(2, (20, 30)).save(special / "small.png")
    photo(3).save(special / "large.png")
    transparent = photo(4).convert("RGBA")
    transparent.putalpha(100)
    transparent.save(special / "clear.png")
    Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100)).save(special / "deep.png")
    (root / "train" / "dog" / "broken.jpg").write_bytes(b"no image")
    return root


def run(source, output, *flags):
    arguments = [str(source), str(output), "--short_side", "40", "--num_workers", "1"]
    return main([*arguments, *map(str, flags)])


def data_of(kind, path):
    flags = ["--data_set", kind, "--data_path", str(path), "--input_size", "32"]
    config = parse_args([*flags, "--exif_orientation", "true"])
    return build_data(config.data, config.augment, config.model.input_size)


@pytest.mark.parametrize("form", ["tar", pytest.param("folders", marks=pytest.mark.slow)])
def test_a_pack_is_the_same_data_set(source, tmp_path, form, capsys):
    output = tmp_path / "packed"
    assert run(source, output, "--format", form) == 0
    kind = "tar" if form == "tar" else "image_folder"
    told = capsys.readouterr().out
    assert f"next: python main.py --data_set {kind} --data_path {output}" in told
    assert "left out, unreadable: 1, in" in told
    listed = (output / "unreadable.txt").read_text()
    assert "broken.jpg" in listed
    assert " at 0x" not in listed
    (source / "train" / "dog" / "broken.jpg").unlink()
    before, after = data_of("image_folder", source), data_of(kind, output)
    assert after.classes == before.classes == ["cat", "dog"]
    for part in ("train", "val"):
        one, other = getattr(before, part), getattr(after, part)
        names = [name.rpartition("/")[2].removesuffix(".jpg").rpartition("__")[2]
                 for name in map(other.name, range(len(other)))]  # fmt: skip
        assert len(one) == len(other)
        for index in range(len(one)):
            file = one.name(index).rpartition("/")[2].removesuffix(".jpg")
            same = [
                k for k in range(len(other))
                if names[k] == file and other.labels[k] == one.labels[index]
            ]  # fmt: skip
            (found,) = same
            image, label = other.read(found)
            expected, wanted = one.read(index)
            assert label == wanted
            if part == "train" and min(expected.size) > 40:
                is_kept = file.startswith(("clear", "deep"))
                assert min(image.size) == (min(expected.size) if is_kept else 40)
            expected = expected.resize(image.size, Image.Resampling.BICUBIC)
            difference = np.abs(np.subtract(image, expected, dtype=np.float32)).mean()
            assert difference < 4, file


def test_files_that_a_jpeg_cannot_hold_are_copied(source):
    folder = source / "train" / "cat"
    for name in ("more/small.png", "more/clear.png", "more/deep.png"):
        content = (folder / name).read_bytes()
        assert packed(str(folder / name), Packing(short_side=40)) == (content, ".png")
    content, suffix = packed(str(folder / "more/large.png"), Packing(short_side=40))
    assert (suffix, content[:2]) == (".jpg", b"\xff\xd8")
    content = (folder / "0.jpg").read_bytes()
    assert packed(str(folder / "0.jpg"), Packing(), shrinks=False)[0] == content
    (folder / "turned.jpg").write_bytes(
        packed(str(folder / "more/turned.jpg"), Packing(short_side=40))[0]
    )
    assert load_image(str(folder / "turned.jpg")).size == (60, 40)


@pytest.mark.slow
def test_shards_of_webdataset(source, tmp_path, capsys):
    output = tmp_path / "packed"
    assert run(source, output, "--format", "wds") == 0
    told = capsys.readouterr().out.split("next: python main.py ")[1]
    flags = [word.strip("'") for word in told.split()[:-1]]
    assert (output / "classes.txt").read_text() == "cat\ndog\n"
    pytest.importorskip("webdataset")
    config = parse_args([*flags, "--input_size", "32", "--num_workers", "1"])
    data = build_data(config.data, config.augment, config.model.input_size)
    assert data.classes == ["cat", "dog"]
    assert (data.train.length, data.val.length) == (19, 4)
    with tarfile.open(output / "train-000000.tar") as tar:
        labels = [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]
    assert labels == [0] * 12 + [1] * 7
    # a part that lacks a class has the numbers of all classes
    shutil.rmtree(source / "val" / "cat")
    assert run(source, tmp_path / "other", "--format", "wds") == 0
    assert (tmp_path / "other" / "classes.txt").read_text() == "cat\ndog\n"
    with tarfile.open(tmp_path / "other" / "val-000000.tar") as tar:
        assert {tar.extractfile(m).read() for m in tar if m.name.endswith(".cls")} == {b"1"}


@pytest.mark.slow
def test_a_stopped_pack_goes_on(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "PER_JOB", 5)
    whole, output = tmp_path / "whole", tmp_path / "packed"
    assert run(source, whole) == 0
    assert run(source, output) == 0
    # as if it had been killed in the second job
    (output / ".pack" / "train-000001.json").unlink()
    (output / "train" / "000001.tar").write_bytes(b"half")
    kept = (output / "train" / "000000.tar").stat().st_mtime_ns
    assert run(source, output) == 0
    assert (output / "train" / "000000.tar").stat().st_mtime_ns == kept
    for name in ("train/000000.tar", "train/000001.tar", "train/000003.tar", "val/000000.tar"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((output / "pack.json").read_text())["images"] == 24


@pytest.mark.slow
def test_a_killed_worker_is_told(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PER_JOB", 1)

    before = {*multiprocessing.active_children()}

    def kill(done, total):
        for worker in {*multiprocessing.active_children()} - before:
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(UserError, match="a worker ended, perhaps for lack of memory"):
        packing.pack(source, tmp_path / "packed", Packing(), 1, kill)
    assert {*multiprocessing.active_children()} <= before
    summary = packing.pack(source, tmp_path / "packed", Packing(), 1)
    assert (summary.images, summary.unreadable) == (23, 1)


@pytest.mark.slow
def test_a_damaged_pack_is_told(source, tmp_path, capsys):
    output = tmp_path / "packed"
    assert run(source, output, "--format", "folders") == 0
    (output / "train" / "cat" / "0.jpg").unlink()
    assert run(source, output, "--format", "folders") == 1
    assert "train has 18 images, not the 19 that were packed" in capsys.readouterr().err


def test_a_pack_holds_out_the_same_images_as_training_does(source, tmp_path, capsys):
    (source / "train" / "dog" / "broken.jpg").unlink()
    flags = ["--data_set", "image_folder", "--data_path", str(source / "train")]
    config = parse_args([*flags, "--val_fraction", "0.4", "--exif_orientation", "true"])
    wanted = build_data(config.data, config.augment, config.model.input_size)
    assert run(source / "train", tmp_path / "packed", "--val_fraction", "0.4") == 0
    assert "next: python main.py --data_set tar --data_path" in capsys.readouterr().out
    found = data_of("tar", tmp_path / "packed")
    for before, after in ((wanted.train, found.train), (wanted.val, found.val)):
        names = [re.sub(r".*/000000/|\.jpg$", "", after.name(i)) for i in range(len(after))]
        assert sorted(names) == sorted(
            re.sub(r".*/train/|\.jpg$", "", before.name(i)).replace("/more/", "/more__")
            for i in range(len(before))
        )
    shutil.rmtree(tmp_path / "packed" / "val")
    with pytest.raises(UserError, match="has no val/ and no val.tar; give --disable_eval true"):
        data_of("tar", tmp_path / "packed")


@pytest.mark.slow
def test_mistakes_are_one_line(source, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a.txt").write_text("mine")
    assert run(source / "train", tmp_path / "train") == 0
    assert "--disable_eval true ...\n" in capsys.readouterr().out
    assert run(source, tmp_path / "packed") == 0
    for arguments, message in (
        ([source, full], "is not empty: give a new folder"),
        ([source, tmp_path / "packed", "--quality", 80], "holds a pack of other quality 92 (now"),
        ([source, source / "packed"], "is inside"),
        ([tmp_path / "none", tmp_path / "x"], "is not a folder"),
        ([source, full / "a.txt"], "cannot be written"),
        ([source, tmp_path / "x", "--quality", 101], "--quality 101: from 1 to 100"),
        ([source, tmp_path / "x", "--val_fraction", 1], "--val_fraction 1.0: at least 0, less"),
        ([source, tmp_path / "x", "--val_fraction", 0.2], "has train, val already, and not"),
        ([full, tmp_path / "x"], "needs one folder of images per class"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 1
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
    assert (full / "a.txt").read_text() == "mine"
