"""--smoke: a config shrunk to seconds on drawn data; every part of it, but small."""

import os
import shutil
from pathlib import Path
from typing import Any

from dense.configs import dicts
from dense.shapes import write_coco, write_masks

WIDTHS = [16, 32, 64, 128]  # of the shrunk backbone's maps
SHARE, LEAST = 8, 64  # sizes of images and crops are divided, but not below
MOST = {  # limits of what is found, sampled and asked for
    "max_per_img": 20,
    "max_per_image": 10,
    "nms_pre": 100,
    "num": 32,
    "num_queries": 20,
    "num_dn_queries": 4,
    "num_points": 128,
}
SIZES = ("scale", "scales", "crop_size", "size", "max_size", "stride")


def shrink(config: Any) -> None:
    """Changes `config` in place: a few steps of a small network on drawn data in work_dir."""
    config.work_dir += "-smoke"
    # a folder for each process, which know nothing of each other yet
    folder = Path(config.work_dir) / f"drawn-{os.environ.get('RANK', 0)}"
    shutil.rmtree(folder, ignore_errors=True)
    _shrink_model(config.model)
    for part in ("train", "val", "test"):
        loader = config[f"{part}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False)
        _redraw(loader.dataset, folder / part, loader.batch_size)
        if "ann_file" in config.get(f"{part}_evaluator", {}):
            config[f"{part}_evaluator"].ann_file = str(folder / part / "annotations.json")
    if "max_iters" in config.train_cfg:
        config.train_cfg.update(max_iters=2, val_interval=2)
        config.default_hooks.checkpoint.interval = 2
    else:
        config.train_cfg.update(max_epochs=1)
    for scheduler in config.param_scheduler:
        if not scheduler.get("by_epoch", True):  # the warm-up one step, the rest the other
            is_first = scheduler.begin == 0 and len(config.param_scheduler) > 1
            scheduler.update(begin=0 if is_first else 1, end=1 if is_first else 2)
    config.default_hooks.logger.interval = 1


def _shrink_model(model: Any) -> None:
    model.backbone.update(base_dim=WIDTHS[0], depths=(1, 1, 1, 1), pretrained=None)
    used = [WIDTHS[i] for i in model.backbone.get("out_indices", range(4))]
    for part in ("neck", "decode_head"):
        if part in model:
            model[part].in_channels = used
    if "auxiliary_head" in model:
        model.auxiliary_head.in_channels = used[model.auxiliary_head.in_index]
    for part in ("data_preprocessor", "test_cfg"):
        _divide_sizes(model.get(part, {}))
    _limit(model)


def _redraw(dataset: Any, folder: Path, batch_size: int) -> None:
    """Two batches of drawn data, in the form and under the classes of `dataset`."""
    from mmdet.registry import DATASETS as MMDET
    from mmseg.registry import DATASETS as MMSEG

    _divide_sizes(dataset.pipeline)
    kind = (MMDET if dataset.type == "CocoDataset" else MMSEG).get(dataset.type)
    classes = (dataset.get("metainfo") or kind.METAINFO)["classes"]
    images = 2 * batch_size
    if dataset.type == "CocoDataset":
        write_coco(folder, images, classes=classes)
        dataset.update(ann_file="annotations.json", data_prefix={"img": "images/"})
        dataset.pop("filter_cfg", None)
    else:
        write_masks(folder, images)
        dataset.data_prefix = {"img_path": "images", "seg_map_path": "masks"}
    dataset.data_root = str(folder)


def _divide_sizes(part: Any) -> None:
    for settings in dicts(part):
        for key in settings.keys() & set(SIZES):
            if settings[key] is not None:
                settings[key] = _divided(settings[key])


def _divided(size: Any) -> Any:
    if isinstance(size, list | tuple):
        return type(size)(map(_divided, size))
    return max(LEAST, size // SHARE)


def _limit(model: Any) -> None:
    for settings in dicts(model):
        for key in settings.keys() & MOST.keys():
            if isinstance(settings[key], int):
                settings[key] = min(settings[key], MOST[key])
        if "score_thr" in settings:
            settings["score_thr"] = 0.0  # a network without training finds something too
