"""--smoke: shrink a config so that it runs in seconds on drawn data, with all its parts."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dense.configs import dicts
from dense.shapes import write_coco, write_masks
from runtime.errors import UserError

WIDTHS = [16, 32, 64, 128]
"""Channels of the shrunk backbone's outputs."""
SMALL: dict[str, dict[str, Any]] = {
    "HorNet": {"base_dim": WIDTHS[0], "depths": (1, 1, 1, 1), "pretrained": None},
    "ResNet": {"depth": 50, "base_channels": WIDTHS[0] // 4},
    "ResNetV1c": {"depth": 50, "base_channels": WIDTHS[0] // 4},
    "SwinTransformer": {
        "embed_dims": WIDTHS[0], "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8),
    },
}  # fmt: skip
"""Arguments of a backbone with these WIDTHS, by its type."""
SIZES = {"scale", "scales", "crop_size", "size", "max_size", "stride"}
"""Sizes of images and crops, divided by 8, but no smaller than 64."""
MOST = {"max_per_img": 20, "max_per_image": 10, "nms_pre": 100, "num": 32}
MOST |= {"num_queries": 20, "num_dn_queries": 4, "num_points": 128}
"""Upper bounds for the numbers of detections, samples and queries."""


def shrink(config: Any) -> None:
    """Change `config` in place: a few steps of a small network on data drawn in work_dir."""
    config.work_dir += "-smoke"
    # a folder per process: the process group does not exist yet
    folder = Path(config.work_dir) / f"drawn-{os.environ.get('RANK', 0)}"
    shutil.rmtree(folder, ignore_errors=True)
    _shrink_model(config.model)
    for part in ("train", "val", "test"):
        loader = config[f"{part}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False)
        _redraw(loader.dataset, folder / part, images=2 * loader.batch_size)
        if "ann_file" in config.get(f"{part}_evaluator", {}):
            config[f"{part}_evaluator"].ann_file = str(folder / part / "annotations.json")
    if "max_iters" in config.train_cfg:
        config.train_cfg.update(max_iters=2, val_interval=2)
        config.default_hooks.checkpoint.interval = 2
    else:
        config.train_cfg.max_epochs = 1
    for scheduler in config.param_scheduler:
        if not scheduler.get("by_epoch", True):  # warm-up in the first step, the rest in the second
            begin = int(scheduler.begin > 0 or len(config.param_scheduler) == 1)
            scheduler.update(begin=begin, end=begin + 1)
    config.default_hooks.logger.interval = 1
    wrapper = config.optim_wrapper
    if wrapper.type == "AmpOptimWrapper" and not torch.cuda.is_available():  # it needs a GPU
        wrapper.type = "OptimWrapper"
        for name in {"loss_scale", "dtype"} & wrapper.keys():
            del wrapper[name]


def _shrink_model(model: Any) -> None:
    kind = model.backbone.type
    model.backbone.update(**SMALL.get(kind, SMALL["HorNet"]))
    if kind != "HorNet" and kind in SMALL:  # their start weights
        model.backbone.init_cfg = None
    if "pretrained" in model:
        model.pretrained = None
    used = [WIDTHS[i] for i in model.backbone.get("out_indices", range(4))]
    for part in ("neck", "decode_head"):
        if part in model:
            model[part].in_channels = used
    if "auxiliary_head" in model:
        model.auxiliary_head.in_channels = used[model.auxiliary_head.in_index]
    for part in ("data_preprocessor", "test_cfg"):
        _divide_sizes(model.get(part, {}))
    for settings in dicts(model):
        for key in settings.keys() & MOST.keys():
            if isinstance(settings[key], int):
                settings[key] = min(settings[key], MOST[key])
        if "score_thr" in settings:
            settings["score_thr"] = 0.0  # an untrained network has detections, too


def _redraw(dataset: Any, folder: Path, images: int) -> None:
    """Replace a data set by so many drawn images with its format and classes."""
    from mmdet.registry import DATASETS

    if "pipeline" not in dataset:
        raise UserError(
            f"--smoke: {dataset.type} is not drawn; try the config of one of its data sets"
        )
    _divide_sizes(dataset.pipeline)
    if dataset.type == "CocoDataset":
        classes = (dataset.get("metainfo") or DATASETS.get(dataset.type).METAINFO)["classes"]
        write_coco(folder, images, classes=classes)
        dataset.update(ann_file="annotations.json", data_prefix={"img": "images/"})
        dataset.pop("filter_cfg", None)
    else:
        write_masks(folder, images)
        dataset.data_prefix = {"img_path": "images", "seg_map_path": "masks"}
    dataset.data_root = str(folder)


def _divide_sizes(part: Any) -> None:
    for settings in dicts(part):
        for key in settings.keys() & SIZES:
            if settings[key] is not None:
                settings[key] = _divided(settings[key])


def _divided(size: Any) -> Any:
    if isinstance(size, list | tuple):
        return type(size)(map(_divided, size))
    return max(64, size // 8)
