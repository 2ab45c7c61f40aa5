"""Runs on point clouds as a user starts them, with a small network on drawn shapes."""

import csv
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch

from checkpoints.reading import read_checkpoint
from point_clouds import run
from point_clouds.flags import parse_args
from point_clouds.shapes import draw_shape
from tests.integration.conftest import ROOT, launch
from training.build import build_model

SHAPES = "cone", "cube", "torus"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for label, name in enumerate(SHAPES):
        for part, count in (("train", 12), ("test", 4)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                cloud = draw_shape(name, 1000 * label + number + 100 * (part == "test"), 60)
                np.save(root / part / name / f"{number}.npy", cloud)
    return root


@pytest.fixture
def config(shapes, tmp_path):
    """A config file, as a user writes one on another."""
    path = tmp_path / "small.yaml"
    path.write_text(
        f"base: {ROOT}/point_clouds/configs/shapes.yaml\n"
        f"data_path: {shapes}\n"
        "backbone_kwargs: {base_dim: 16, depths: [1, 1, 1, 1], layer_scale_init_value: 0.5}\n"
        "num_points: 48\nlocal_size: 4\ngraph_dim: 8\nobj_size: 16\ninput_size: 32\n"
        "num_workers: 0\ndevice: cpu\nbatch_size: 8\nepochs: 2\nwarmup_epochs: 0\n"
        "val_fraction: 0.3\nlog_interval: 1\n"
    )
    return str(path)


def train(config, folder, *flags):
    run.main("train", [config, "--output_dir", str(folder), *flags])
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def predictions(folder):
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_training_ends_in_a_vote_on_the_test_clouds(config, tmp_path, capsys):
    log = train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert [record["epoch"] for record in log] == [0, 1]
    assert "test on 12 images" in printed
    rows = predictions(tmp_path / "run")
    assert len(rows) == 12
    assert all("/test/" in row["file"] for row in rows)
    right = [row["class"] == row["predicted"] for row in rows]
    voted = printed.rpartition("test on 12 images: top-1 ")[2]
    assert float(voted.split("%")[0]) == pytest.approx(100 * sum(right) / 12, abs=0.01)
    per_class = [sum(r for r, row in zip(right, rows, strict=True) if row["class"] == name) / 4
                 for name in SHAPES]  # fmt: skip
    shown = printed.rpartition("mean accuracy of the classes: ")[2].split("%")[0]
    assert float(shown) == pytest.approx(100 * sum(per_class) / 3, abs=0.01)
    # the same again from the files of the run
    run.main("test", [str(tmp_path / "run/config.yaml"), str(tmp_path / "run/checkpoint-best.pth"),
                      "--output_dir", str(tmp_path / "again")])  # fmt: skip
    assert predictions(tmp_path / "again") == rows


def test_single_views_are_evaluated_after_each_epoch(config, tmp_path, capsys):
    train(config, tmp_path / "run", "--epochs", "1")
    held_out = capsys.readouterr().out.partition(" evaluation images")[0].split()[-1]
    log = (tmp_path / "run/log.txt").read_text()
    accuracy = json.loads(log)["test_acc1"]
    # eight views per cloud count
    assert (accuracy / 100 * 8 * int(held_out)) == pytest.approx(
        round(accuracy / 100 * 8 * int(held_out)), abs=1e-6
    )


def assert_same_weights(one, other, tolerance=0.0):
    left, right = (read_checkpoint(folder / "checkpoint-1.pth")["model"] for folder in (one, other))
    for name, weight in left.items():
        distance = (weight.double() - right[name].double()).norm()
        assert distance <= tolerance * (weight.double().norm() + 0.1), name


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(config, tmp_path):
    flags = ["--sync_bn", "true", "--lr", "1e-3"]
    one = train(config, tmp_path / "one", *flags)
    done = launch(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "point_clouds.train", config, "--batch_size", "4", *flags),
        *("--output_dir", tmp_path / "two"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = [json.loads(line) for line in (tmp_path / "two/log.txt").read_text().splitlines()]
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    assert_same_weights(tmp_path / "one", tmp_path / "two", 2e-3)
    assert [row["predicted"] for row in predictions(tmp_path / "one")] == [
        row["predicted"] for row in predictions(tmp_path / "two")
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(config, tmp_path):
    whole = train(config, tmp_path / "whole")
    command = [sys.executable, "-m", "point_clouds.train", config, "--output_dir"]
    command += [str(tmp_path / "killed"), "--save_ckpt_steps", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoint-0-2.pth").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    resumed = train(config, tmp_path / "killed")
    assert resumed == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_released_checkpoints_are_tested(config, tmp_path, capsys):
    train(config, tmp_path / "run", "--epochs", "1")
    rows = predictions(tmp_path / "run")
    weights = read_checkpoint(tmp_path / "run/checkpoint-best.pth")["model"]
    # its pointwise layers are linear, (out, in)
    released = {
        "epoch": 299,
        "state_dict": {
            f"module.{name}": value[:, :, 0, 0] if "pwconv" in name and value.ndim == 4 else value
            for name, value in weights.items()
        },
        "optimizer": {},
        "best_acc_cls": np.float64(0.9),
        "current_iter": 100,
    }
    torch.save(released, tmp_path / "released.pth")
    capsys.readouterr()
    run.main("test", [config, str(tmp_path / "released.pth"), "--output_dir",
                      str(tmp_path / "tested")])  # fmt: skip
    assert predictions(tmp_path / "tested") == rows


@pytest.fixture
def backbone(config, tmp_path):
    """Start weights: a classifier of five classes."""
    kwargs = parse_args(["--config", config]).points.backbone_kwargs
    torch.manual_seed(7)
    model = timm.create_model("hornet_atto_7x7", num_classes=5, **kwargs)
    torch.save({"model": model.state_dict()}, tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


@pytest.mark.slow
def test_start_weights_of_the_backbone_stay_frozen_and_need_not_be_saved(
    config, backbone, tmp_path, capsys
):
    flags = ["--finetune", str(backbone), "--update_type", "norm"]
    train(config, tmp_path / "whole", *flags)
    train(config, tmp_path / "run", *flags, "--save_frozen", "false")
    start = torch.load(backbone)["model"]
    whole, part = (
        read_checkpoint(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "run")
    )
    frozen = part["left_out"].keys()
    assert frozen == whole["model"].keys() - part["model"].keys()
    assert "base_model.stages.0.0.gnconv.proj_in.weight" in frozen
    for name in frozen:
        assert torch.equal(whole["model"][name], start[name.removeprefix("base_model.")])
    assert predictions(tmp_path / "run") == predictions(tmp_path / "whole")
    # resumed inside the run
    (tmp_path / "run/checkpoint-1.pth").unlink()
    train(config, tmp_path / "run", *flags, "--save_frozen", "false")
    again = read_checkpoint(tmp_path / "run/checkpoint-1.pth")["model"]
    assert all(torch.equal(again[name], part["model"][name]) for name in again)
    # the start weights may have another place
    moved = tmp_path / "moved.pth"
    backbone.rename(moved)
    config_of_run = str(tmp_path / "run/config.yaml")
    command = [config_of_run, str(tmp_path / "run/checkpoint-1.pth"), "--finetune", str(moved)]
    run.main("test", [*command, "--output_dir", str(tmp_path / "tested")])
    moved.rename(backbone)
    other = train(config, tmp_path / "second", "--update_type", "norm",
                  "--finetune", str(tmp_path / "run/checkpoint-1.pth"))  # fmt: skip
    assert other
    # other start weights in the same place are noticed
    start["downsample_layers.0.0.weight"] *= 2
    torch.save({"model": start}, backbone)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"leaves out .*, which is another one in the start"):
        run.main("test", [config, str(tmp_path / "run/checkpoint-1.pth")])


def test_fine_tuning_on_other_classes_keeps_the_encoder(config, shapes, tmp_path):
    train(config, tmp_path / "first", "--epochs", "1")
    other = tmp_path / "other"
    for part in ("train", "test"):
        for name in SHAPES[:2]:
            shutil.copytree(shapes / part / name, other / part / name)
    source = tmp_path / "first/checkpoint-best.pth"
    flags = ["--data_path", str(other), "--finetune", str(source), "--lr", "0", "--epochs", "1"]
    train(config, tmp_path / "second", *flags)
    before, after = (
        read_checkpoint(path)["model"]
        for path in (source, tmp_path / "second/checkpoint-start.pth")
    )
    assert torch.equal(before["enc.proj_layer.weight"], after["enc.proj_layer.weight"])
    assert after["base_model.head.weight"].shape[0] == 2


@pytest.mark.parametrize(
    ("action", "arguments", "message"),
    [
        ("train", [], "expected python -m point_clouds.train CONFIG"),
        ("test", ["CONFIG"], "expected python -m point_clouds.test CONFIG CHECKPOINT"),
        ("train", ["missing.yaml"], "missing.yaml cannot be read"),
        ("test", ["CONFIG", "missing.pth"], "missing.pth does not exist"),
        ("train", ["CONFIG", "--backbone", "resnet99"], "near names: resnet"),
        ("train", ["CONFIG", "--obj_size", "31"], "obj_size 31: give an even number"),
        ("train", ["CONFIG", "--num_points", "3"], "fewer than the --local_size"),
        ("train", ["CONFIG", "--data_path", "missing"], "--data_path missing is not a folder"),
    ],
)
def test_mistakes_end_in_one_line(action, arguments, message, config, monkeypatch):
    arguments = [config if argument == "CONFIG" else argument for argument in arguments]
    with pytest.raises(SystemExit) as error:
        run.main(action, arguments)
    assert str(error.value).startswith(f"point_clouds.{action}: error: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_network_is_refused(config, tmp_path):
    other = parse_args(["--config", config, "--graph_dim", "16"])
    state = build_model(other.model, 3).state_dict()
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="is of another model"):
        run.main("test", [config, str(tmp_path / "other.pth")])
