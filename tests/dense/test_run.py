"""train.py and test.py of both trees on drawn data, with released configs made small."""

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch

from dense.run import load_config, main
from runtime.errors import UserError
from tests.dense.shapes import write_coco, write_masks
from tests.integration.conftest import ROOT, launch

BACKBONE = (
    'dict(arch="atto_gf", base_dim=16, depths=(1, 1, 2, 1), drop_path_rate=0.0, pretrained=None)'
)
DETECTOR = f"""
_base_ = ["{ROOT}/object_detection/configs/horfpn/CONFIG"]
model = dict(
    backbone={BACKBONE},
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        mask_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=2),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_classes=2),
    ),
)
_load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
]
_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
_pipeline = [*_load, dict(type="Resize", scale=(96, 96), keep_ratio=True)]


def _part(name):
    return dict(
        _delete_=True,
        type="CocoDataset",
        data_root=f"DATA/{{name}}",
        ann_file="annotations.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=("circle", "square")),
        pipeline=[*_pipeline, dict(type="PackDetInputs", meta_keys=_keys)],
    )


train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=_part("train")
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_part("val"))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="DATA/val/annotations.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""
SEGMENTOR = f"""
_base_ = ["{ROOT}/semantic_segmentation/configs/horfpn/CONFIG"]
crop_size = (96, 96)
_bn = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone={BACKBONE},
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=32, num_classes=3, norm_cfg=_bn),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=3, norm_cfg=_bn),
    test_cfg=dict(crop_size=crop_size, stride=(64, 64)),
)


def _part(name):
    return dict(
        _delete_=True,
        type="BaseSegDataset",
        data_root=f"DATA/{{name}}",
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        seg_map_suffix=".png",
        img_suffix=".png",
        metainfo=dict(classes=("ground", "circle", "square"), palette=[[0, 0, 0]] * 3),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    )


train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=_part("train")
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_part("val"))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=4))
"""


def write_config(folder: Path, text: str, base: str) -> Path:
    path = folder / "small.py"
    path.write_text(text.replace("CONFIG", base).replace("DATA", str(folder)))
    return path


def run(module, *arguments):
    done = launch("-m", module, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["7x7", "gf"])
def test_detector_trains_resumes_and_is_tested(tmp_path, kind):
    write_coco(tmp_path / "train", 8)
    write_coco(tmp_path / "val", 4, seed=1)
    base = f"horfpn_{kind}_mask_rcnn_hornet_small_7x7_1x_coco_in1k.py"
    config = write_config(tmp_path, DETECTOR, base)
    work = ["--work-dir", tmp_path / "work"]
    out = run("object_detection.train", config, *work)
    assert "coco/bbox_mAP" in out
    assert "coco/segm_mAP" in out
    more = ["--resume", "--no-validate", "--cfg-options", "train_cfg.max_epochs=2"]
    assert "resumed epoch: 1, iter: 2" in run("object_detection.train", config, *work, *more)
    results = tmp_path / "results.pkl"
    out = run(
        *("object_detection.test", config, tmp_path / "work/epoch_2.pth", "--out", results),
        *("--show-dir", "shown", "--work-dir", tmp_path / "test", "--eval", "bbox", "segm"),
    )
    assert "coco/bbox_mAP" in out
    assert results.is_file()
    assert len(list((tmp_path / "test").rglob("shown/*.png"))) == 4


def test_segmentor_trains_and_is_tested(tmp_path):
    write_masks(tmp_path / "train", 8)
    write_masks(tmp_path / "val", 3, seed=1)
    base = "horfpn_gf_upernet_hornet_small_7x7_512_160k_ade20k.py"
    config = write_config(tmp_path, SEGMENTOR, base)
    out = run("semantic_segmentation.train", config, "--work-dir", tmp_path / "work")
    assert "mIoU" in out
    weights = tmp_path / "work/iter_4.pth"
    again = run(
        *("semantic_segmentation.test", config, weights, "--work-dir", tmp_path / "test"),
        *("--eval", "mIoU"),
    )
    found = re.findall(r"mIoU: ([\d.]+)", out + again)
    assert len(found) == 2
    assert found[0] == found[1]


def arguments(config, **options):
    return argparse.Namespace(config=config, cfg_options=options, launcher="none", work_dir=None)


def test_settings_of_the_released_commands():
    name = "configs/hornet/cascade_mask_rcnn_hornet_tiny_gf_3x_coco_in1k.py"
    config = load_config(arguments(name, **{"model.pretrained": "x.pth"}), "object_detection")
    assert config.model.backbone.pretrained == "x.pth"
    assert "pretrained" not in config.model
    assert config.work_dir == "work_dirs/cascade_mask_rcnn_hornet_tiny_gf_3x_coco_in1k"
    path = f"semantic_segmentation/{name}"
    with pytest.raises(UserError, match="does not exist"):
        load_config(arguments(path), "semantic_segmentation")


def test_broken_config_is_one_line(tmp_path, capsys):
    (tmp_path / "c.py").write_text("model = dict(\n")
    assert main("object_detection", "train", [str(tmp_path / "c.py")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("object_detection.train: error: config ")
    assert error.count("\n") == 1


def test_without_the_stack(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    assert main("object_detection", "train", ["c.py"]) == 1
    assert "run `make dense` once" in capsys.readouterr().err


def test_flags_that_cannot_work_here(tmp_path, capsys):
    config = "configs/hornet/upernet_hornet_tiny_gf_512_160k_ade20k.py"
    if not torch.cuda.is_available():
        assert main("semantic_segmentation", "train", [config, "--amp"]) == 1
        assert "--amp needs a GPU" in capsys.readouterr().err
    assert main("semantic_segmentation", "train", [config, "--auto-scale-lr"]) == 1
    assert "no base_batch_size" in capsys.readouterr().err
