"""train.py and test.py of both trees on drawn data, with released configs made small."""

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, init_default_scope
from mmseg.datasets import ADE20KDataset
from mmseg.registry import MODELS as SEG_MODELS
from PIL import Image

import dense.run
from dense.configs import read_config
from dense.loading import read
from dense.run import load_config, main, newest_checkpoint
from dense.smoke import shrink
from dense.tta import use_several_views
from runtime.errors import UserError
from tests.dense.conftest import forget_runs
from tests.integration.conftest import ROOT, free_port, launch

DETECTOR = "configs/horfpn/horfpn_{}_mask_rcnn_hornet_small_7x7_1x_coco_in1k.py"
SEGMENTOR = "configs/horfpn/horfpn_{}_upernet_hornet_small_7x7_512_160k_ade20k.py"


def small(name, folder, **changes):
    """The config made small, as a file in `folder`; its data are drawn beside it."""
    task = "object_detection" if "rcnn" in name else "semantic_segmentation"
    config = read_config(name, task)
    config.work_dir = str(folder / "work")
    shrink(config)
    config.merge_from_dict(changes)
    config.dump(folder / "small.py")
    return str(folder / "small.py")


def run(module, *words):
    """In this process, since another one would import the mm stack again."""
    assert main(*module.split("."), [str(word) for word in words]) == 0
    forget_runs()


def bash(*command):
    """A dist_*.sh from the root, as a user starts it."""
    environment = {"PYTHON": sys.executable, "PORT": str(free_port())}
    done = subprocess.run(
        ["bash", *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def metrics(folder):
    """What test.py wrote as its result."""
    (path,) = folder.glob("*/*.json")
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if "time" not in name}


def test_images_of_several_sizes_are_tested_one_by_one(tmp_path, capsys):
    config = small("configs/finetune/upernet_own_data.py", tmp_path)
    images = tmp_path / "work-smoke/drawn-0/test"
    for part, suffix in (("images", "jpg"), ("masks", "png")):
        with Image.open(images / part / f"0000.{suffix}") as image:
            image.crop((0, 0, 96, 64)).save(images / part / f"0000.{suffix}")
    init_default_scope("mmseg")
    weights = SEG_MODELS.build(read_config(config).model).state_dict()
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "w.pth")
    test = [config, str(tmp_path / "w.pth"), "--work-dir", str(tmp_path / "t"), "--cfg-options"]
    for views in ([], ["--tta"]):
        several = [*test, "test_dataloader.batch_size=2", *views]
        assert main("semantic_segmentation", "test", several) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("semantic_segmentation.test: error: images of one batch differ in")
        assert line.endswith("set test_dataloader.batch_size=1")
    assert main("semantic_segmentation", "test", [*test, "test_dataloader.batch_size=1"]) == 0


def test_a_killed_training_reaches_the_same_iteration(tmp_path):
    config = small(DETECTOR.format("7x7"), tmp_path, **{"train_cfg.max_epochs": 4})
    work = tmp_path / "work"
    command = ["-m", "object_detection.train", config, "--work-dir", str(work), "--no-validate"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (work / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = [p.name for p in work.glob("epoch_*.pth")]
    assert saved
    assert "epoch_4.pth" not in saved
    done = launch(*command, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    epoch = int(re.search(r"resumed epoch: (\d)", done.stdout + done.stderr)[1])
    assert f"epoch_{epoch}.pth" in saved
    state = torch.load(work / "epoch_4.pth", weights_only=True)
    assert (state["meta"]["epoch"], state["meta"]["iter"]) == (4, 8)
    steps = {int(s["step"]) for s in state["optimizer"]["state"].values()}
    assert max(steps) == 8


def test_two_processes(tmp_path, monkeypatch, capsys):
    """Gradients are those of all processes, and every image counts once."""
    config = small(
        DETECTOR.format("gf"),
        tmp_path,
        **{"model.backbone.frozen_stages": 0, "train_cfg.max_epochs": 2},
    )
    drawn = tmp_path / "work-smoke/drawn-0/train/annotations.json"
    content = json.loads(drawn.read_text())
    content["annotations"][0].pop("area")  # the first process repairs the file
    drawn.write_text(json.dumps(content))
    out = bash("object_detection/dist_train.sh", config, 2, "--work-dir", tmp_path / "work")
    assert (tmp_path / "work/train-annotations.json").is_file()
    saved = read_config(str(tmp_path / "work/small.py"))  # names one's own file, not the repaired
    assert saved.train_dataloader.dataset.ann_file == "annotations.json"
    assert "coco/segm_mAP" in out
    weights = tmp_path / "work" / "epoch_2.pth"
    assert read(str(weights))["meta"]["iter"] == 2  # two images each of four, twice
    both = ["--eval", "bbox", "segm", "--work-dir"]
    bash("object_detection/dist_test.sh", config, weights, 2, *both, tmp_path / "two")
    results = ["--out", tmp_path / "results.pkl", "--show-dir", tmp_path / "shown"]
    run("object_detection.test", config, weights, *results, *both, tmp_path / "one")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert "coco/bbox_mAP" in metrics(tmp_path / "one")
    found = pickle.loads((tmp_path / "results.pkl").read_bytes())
    assert len(found) == 2
    assert "gt_instances" not in found[0]
    assert found[0]["pred_instances"]["masks"][0]["size"] == [96, 96]  # run-length encoded
    assert len(list((tmp_path / "shown").iterdir())) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    several = ["--launcher", "pytorch", "--show-dir", str(tmp_path / "shown")]
    assert main("object_detection", "test", [config, str(weights), *several]) == 1
    assert "--show-dir: only the first process draws" in capsys.readouterr().err


def test_segmentor_trains_and_is_tested(tmp_path):
    config = small(SEGMENTOR.format("gf"), tmp_path)
    run("semantic_segmentation.train", config, "--work-dir", tmp_path / "work")
    weights = tmp_path / "work/iter_2.pth"
    test = ["semantic_segmentation.test", config, weights, "--eval", "mIoU"]
    shown = ["--show-dir", tmp_path / "shown", "--out", tmp_path / "out"]
    run(*test, "--work-dir", tmp_path / "one", *shown)
    masks = [np.array(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    assert [mask.shape for mask in masks] == [(96, 96)] * 2
    assert min(mask.min() for mask in masks) >= 1  # as ADE20K's files: 0 is no class
    assert max(mask.max() for mask in masks) <= 150
    bash(
        *("semantic_segmentation/dist_test.sh", config, weights, 2, "--eval", "mIoU"),
        *("--work-dir", tmp_path / "two"),
    )
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert len(list((tmp_path / "shown").iterdir())) == 2
    run(*test, "--aug-test", "--work-dir", tmp_path / "several")
    assert metrics(tmp_path / "several").keys() == metrics(tmp_path / "one").keys()
    log = next((tmp_path / "several").glob("*/*.log")).read_text()
    assert "SegTTAModel" in log


def names_of_a_released_detector():
    """The parts of mmdet 2's Cascade Mask R-CNN beside the backbone."""
    names = {f"neck.{part}.{i}.conv" for part in ("lateral_convs", "fpn_convs") for i in range(4)}
    names |= {f"rpn_head.{part}" for part in ("rpn_conv", "rpn_cls", "rpn_reg")}
    for stage in range(3):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        names |= {f"{box}.shared_convs.{i}.{kind}" for i in range(4) for kind in ("conv", "bn")}
        names |= {f"{box}.{part}" for part in ("shared_fcs.0", "fc_cls", "fc_reg")}
        names |= {f"{mask}.convs.{i}.conv" for i in range(4)}
        names |= {f"{mask}.{part}" for part in ("upsample", "conv_logits")}
    return names


def names_of_a_released_segmentor():
    """The parts of mmseg 0's UPerNet beside the backbone, with a gnConv as its last fusion."""
    own = {f"psp_modules.{i}.1.{kind}" for i in range(4) for kind in ("conv", "bn")}
    for part in ("bottleneck", *(f"{k}_convs.{i}" for k in ("lateral", "fpn") for i in range(3))):
        own |= {f"{part}.{kind}" for kind in ("conv", "bn")}
    own |= {f"fpn_bottleneck.{k}" for k in ("proj_in", "dwconv", "pws.0", "proj_out", "bn")}
    names = {f"decode_head.{name}" for name in (*own, "conv_seg")}
    return names | {f"auxiliary_head.{n}" for n in ("convs.0.conv", "convs.0.bn", "conv_seg")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "object_detection/configs/hornet/cascade_mask_rcnn_hornet_tiny_7x7_3x_coco_in1k.py",
            names_of_a_released_detector(),
        ),
        (f"semantic_segmentation/{SEGMENTOR.format('7x7')}", names_of_a_released_segmentor()),
    ],
)
def test_names_of_the_released_models(name, expected):
    config = read_config(name)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    found = {name.rpartition(".")[0] for name in model.state_dict()}
    assert {name for name in found if not name.startswith("backbone.")} == expected


def test_a_released_segmentor_is_tested(tmp_path, server):
    """Weights in the release's form, from an address that names no file."""
    config = small(SEGMENTOR.format("7x7"), tmp_path)
    run("semantic_segmentation.train", config, "--work-dir", tmp_path / "work")
    state = read(str(tmp_path / "work/iter_2.pth"))
    meta = {"CLASSES": ("wall",), "PALETTE": [[1, 2, 3]], "mmseg_version": "0.11.0", "iter": 2}
    released = {"meta": meta, "state_dict": state["state_dict"], "optimizer": state["optimizer"]}
    torch.save(released, tmp_path / "released.pth")
    server.pages["/f/abc/?dl=1"] = (tmp_path / "released.pth").read_bytes()
    test = ["semantic_segmentation.test", config]
    run(*test, f"{server.address}/f/abc/?dl=1", "--work-dir", tmp_path / "one")
    run(*test, tmp_path / "work/iter_2.pth", "--work-dir", tmp_path / "two")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    # it has no state that mmengine could resume
    done = launch(
        "-m", "semantic_segmentation.train", config, "--resume", tmp_path / "released.pth"
    )
    assert "start from its weights by --load-from" in done.stderr
    assert done.returncode == 1


def test_the_newest_checkpoint_lies_in_the_folder_itself(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    for name in ("iter_2.pth", "iter_10.pth", "best_mIoU_iter_2.pth"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path).endswith("/iter_10.pth")
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_2.pth")  # the folder was moved
    assert newest_checkpoint(tmp_path) == str(tmp_path / "iter_2.pth")


def fails(capsys, task, action, *argv):
    """The one line in which a command ends."""
    assert main(task, action, [str(word) for word in argv]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{task}.{action}: error: ")
    return line


def test_data_that_do_not_fit(tmp_path, capsys):
    config = small(DETECTOR.format("7x7"), tmp_path)
    train = ["object_detection", "train", config, "--work-dir", tmp_path / "work"]
    path = tmp_path / "work-smoke/drawn-0/train/annotations.json"
    text = path.read_text()
    path.write_text(text.replace('"person"', '"people"'))
    assert "has no category 'person'" in fails(capsys, *train)
    path.write_text(text.replace('"width": 96', '"width": 95'))
    assert "96 x 96 pixels, the annotation file gives 95 x 96" in fails(capsys, *train)
    path.write_text(text[:-20])
    assert f"{path} is not in COCO's format" in fails(capsys, *train)
    other = tmp_path / "work-smoke/drawn-0/val/annotations.json"
    path.write_text(text)
    whole = other.read_text()
    other.write_text(whole[:-20])
    assert f"{other} is not in COCO's format" in fails(capsys, *train)
    other.write_text(whole.replace('"person"', '"people"'))
    assert "has no category 'person'" in fails(capsys, *train)
    other.write_text(whole)
    (tmp_path / "w.pth").touch()
    test = ["object_detection", "test", config, tmp_path / "w.pth", "--work-dir", tmp_path / "t"]
    path = tmp_path / "work-smoke/drawn-0/test/annotations.json"
    path.write_text(text.replace('"person"', '"people"'))
    assert "has no category 'person'" in fails(capsys, *test)
    path = tmp_path / "work-smoke/drawn-0/train/annotations.json"
    path.write_text(json.dumps(json.loads(text) | {"images": [], "annotations": []}))
    assert "it has no annotations" in fails(capsys, *train)
    path.unlink()
    assert "No such file or directory" in fails(capsys, *train)
    assert str(path) in fails(capsys, *train)
    shutil.rmtree(tmp_path / "work-smoke")
    line = fails(capsys, *train)
    assert f"is not a folder; put the data there, or set data_root in {config}" in line


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"data_prefix": {"img": "images/"}}, True),
        ({"ann_file": "/elsewhere/annotations.json"}, False),
        ({"data_root": "s3://bucket/coco"}, False),
        ({"backend_args": {"backend": "petrel"}}, False),
    ],
)
def test_only_a_data_root_that_is_used_has_to_exist(changes, is_refused, tmp_path):
    dataset = {"data_root": str(tmp_path / "none"), "ann_file": "annotations.json", **changes}
    config = Config(
        {"train_dataloader": {"dataset": {"type": "RepeatDataset", "dataset": dataset}}}
    )
    refused = (
        pytest.raises(UserError, match="none is not a folder") if is_refused else nullcontext()
    )
    with refused:
        dense.run._check_roots(config, ("train", "val"))


def test_a_warm_up_that_never_ends(tmp_path, capsys):
    config = small(DETECTOR.format("7x7"), tmp_path, **{"param_scheduler.0.end": 3})
    assert "the warm-up of 3 iterations is longer than the training of 2" in fails(
        capsys, "object_detection", "train", config, "--work-dir", tmp_path / "work"
    )


def test_checkpoints_that_do_not_fit(tmp_path, capsys):
    config = small(SEGMENTOR.format("7x7"), tmp_path)
    train = ["semantic_segmentation", "train", config, "--work-dir", tmp_path / "work"]
    assert main(*train[:2], [str(word) for word in train[2:]]) == 0
    weights = tmp_path / "work/iter_2.pth"
    state = read(str(weights))
    wider = "model.backbone.base_dim=32"
    widths = [
        "model.decode_head.in_channels=[32,64,128,256]",
        "model.auxiliary_head.in_channels=128",
    ]
    other = ["--cfg-options", wider, *widths]
    for flag in ("--load-from", "--resume", "--resume-from"):
        assert "is of another model: it has another shape of" in fails(
            capsys, *train, flag, weights, *other
        )
    test = ["semantic_segmentation", "test", config]
    assert "is of another model" in fails(capsys, *test, weights, *other)
    assert "does not exist" in fails(capsys, *test, tmp_path / "none.pth")
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:5000])
    assert "it may be truncated" in fails(capsys, *test, tmp_path / "half.pth")
    classifier = timm.create_model("hornet_atto_7x7").state_dict()
    torch.save({"model": classifier}, tmp_path / "classifier.pth")
    assert "model.pretrained=PATH" in fails(
        capsys, *train, "--load-from", tmp_path / "classifier.pth"
    )
    assert "is not of a detector" in fails(capsys, *test, tmp_path / "classifier.pth")
    pretrained = ["--options", f"model.pretrained={weights}", wider, *widths]
    assert "is of another model" in fails(capsys, *train, *pretrained)
    # a resumed run needs no start weights, which may be out of reach by then
    gone = ["--cfg-options", "model.pretrained=gone.pth", "train_cfg.max_iters=2"]
    again = [*train, "--resume", weights, *gone]
    assert main(*again[:2], [str(word) for word in again[2:]]) == 0
    torch.testing.assert_close(read(str(weights))["state_dict"], state["state_dict"])


def test_a_detector_gives_its_backbone_to_one_of_other_classes(tmp_path, capsys):
    config = small(SEGMENTOR.format("7x7"), tmp_path)
    train = ["semantic_segmentation", "train", config, "--work-dir", tmp_path / "work"]
    assert main(*train[:2], [str(word) for word in train[2:]]) == 0
    weights = tmp_path / "work/iter_2.pth"
    heads = [f"model.{head}.num_classes=60" for head in ("decode_head", "auxiliary_head")]
    known = [name for name in ADE20KDataset.METAINFO["classes"] if name.isalpha()]
    names = ",".join(f"'{name}'" for name in known[:60])
    for part in ("train", "val"):
        data = f"{part}_dataloader.dataset.metainfo"
        heads += [f"{data}.classes=[{names}]", f"{data}.palette=[]"]
    still = ["optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0"]
    other = [
        *train[:-1],
        tmp_path / "other",
        "--load-from",
        weights,
        "--cfg-options",
        *heads,
        *still,
    ]
    assert main(*other[:2], [str(word) for word in other[2:]]) == 0
    old, new = (read(str(path))["state_dict"] for path in (weights, tmp_path / "other/iter_2.pth"))
    taken = [n for n in old if n.startswith("backbone.")]
    torch.testing.assert_close({n: new[n] for n in taken}, {n: old[n] for n in taken})
    assert len(new["decode_head.conv_seg.bias"]) == 60


def test_several_views(tmp_path, capsys):
    config = read_config(f"semantic_segmentation/{SEGMENTOR.format('7x7')}")
    use_several_views(config)
    sizes, flips, *_ = config.test_dataloader.dataset.pipeline[1].transforms
    assert [view.scale for view in sizes] == [
        *((1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)),
    ]
    assert [view.prob for view in flips] == [0, 1]
    config = small(DETECTOR.format("7x7"), tmp_path)
    assert "this detector has masks too" in fails(
        capsys, "object_detection", "test", config, "x.pth", "--tta"
    )
    config = small("configs/finetune/faster_rcnn_own_data.py", tmp_path)
    run("object_detection.train", config, "--work-dir", tmp_path / "work")
    test = ["object_detection.test", config, tmp_path / "work/epoch_1.pth", "--tta"]
    run(*test, "--work-dir", tmp_path / "several")
    assert "coco/bbox_mAP" in metrics(tmp_path / "several")


def test_rates_follow_the_batch_where_asked(tmp_path):
    config = small(DETECTOR.format("7x7"), tmp_path)
    for flag, rate in ([], 1e-4), (["--auto-scale-lr"], 1e-4 * 2 / 16):
        work = tmp_path / f"work{len(flag)}"
        run("object_detection.train", config, "--work-dir", work, "--no-validate", *flag)
        groups = read(str(work / "epoch_1.pth"))["optimizer"]["param_groups"]
        assert max(group["initial_lr"] / group["lr_scale"] for group in groups) == pytest.approx(
            rate
        )


def test_mixed_precision_takes_mmengines_wrapper(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    class StopError(Exception):
        pass

    def build(config, *_):
        seen.append(config.optim_wrapper)
        raise StopError

    monkeypatch.setattr(dense.run, "_runner", build)
    with pytest.raises(StopError):
        main("object_detection", "train", [DETECTOR.format("7x7"), "--amp"])
    assert OPTIM_WRAPPERS.get(seen[0].type) is AmpOptimWrapper
    assert seen[0].loss_scale == "dynamic"


def arguments(config, **options):
    return argparse.Namespace(config=config, cfg_options=options, launcher="none", work_dir=None)


def test_settings_of_the_released_commands(tmp_path, monkeypatch):
    name = "configs/hornet/cascade_mask_rcnn_hornet_tiny_gf_3x_coco_in1k.py"
    config = load_config(arguments(name, **{"model.pretrained": "x.pth"}), "object_detection")
    assert config.model.backbone.pretrained == "x.pth"
    assert "pretrained" not in config.model
    assert config.work_dir == "work_dirs/cascade_mask_rcnn_hornet_tiny_gf_3x_coco_in1k"
    path = f"semantic_segmentation/{name}"
    with pytest.raises(UserError, match="does not exist"):
        load_config(arguments(path), "semantic_segmentation")
    for task in ("object_detection", ""):  # tools.flops and tools.web read those of both tasks
        with pytest.raises(UserError, match="near names: ") as told:
            read_config(name.replace("hornet_tiny", "hornet_tinny"), task)
        near = str(told.value).partition("near names: ")[2].split(", ")
        assert Path(near[0]).name == Path(name).name
        monkeypatch.chdir(tmp_path)  # the names hold in any folder
        assert read_config(near[0], task).default_scope == "mmdet"


def test_broken_config_is_one_line(tmp_path, capsys):
    (tmp_path / "c.py").write_text("model = dict(\n")
    assert "error: config " in fails(capsys, "object_detection", "train", tmp_path / "c.py")


def test_without_the_stack(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    assert "run `make dense` once" in fails(capsys, "object_detection", "train", "c.py")


def test_flags_that_cannot_work_here(capsys):
    train = ["object_detection", "train", DETECTOR.format("7x7")]
    if not torch.cuda.is_available():
        assert "--amp needs a GPU" in fails(capsys, *train, "--amp")
        assert "--launcher slurm needs GPUs" in fails(capsys, *train, "--launcher", "slurm")
    test = ["object_detection", "test", DETECTOR.format("7x7"), "x.pth"]
    assert "give a name that ends in .pkl" in fails(capsys, *test, "--out", "x.json")
    assert "settings as NAME=VALUE" in fails(capsys, *train, "--cfg-options", "foo")
    unknown = ["--cfg-options", "model.backbone.archh=atto_7x7", "model.backbone.pretrained=None"]
    assert "did you mean arch?" in fails(capsys, *train, *unknown)
    part = "configs/_base_/coco_hornet.py"
    assert "it lacks a model" in fails(capsys, "object_detection", "train", part)
