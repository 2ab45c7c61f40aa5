"""Checks on loading that images fit their annotations and masks; errors name the file.

Without them mmdet and mmseg end in an obscure error (a mask value without a class stops a GPU).
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from PIL import Image

from dense.folders import tell_other_suffixes
from input_pipeline.images import orientation_of
from runtime.errors import UserError, reason_of, some

SOME = 100
"""Images and masks that are looked at before a run."""
Step = Callable[[dict[str, Any]], dict[str, Any]]  # a transform of a data set's pipeline


def check(dataset: Any) -> None:
    """Check a data set, and make it check each image on loading.

    Raises UserError if there are no images; on loading, if a file cannot be read, or the image or
    mask does not fit.
    """
    # wrappers such as ConcatDataset and RepeatDataset
    for inner in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if inner is not None:
            check(inner)
    if not isinstance(dataset, CocoDataset | BaseSegDataset):
        return
    count = min(SOME, len(dataset))
    infos = [dataset.get_data_info(i * len(dataset) // count) for i in range(count)]
    if isinstance(dataset, BaseSegDataset):
        tell_other_suffixes(dataset)
        _tell_values(dataset, infos)
    _tell_turned(dataset, [info["img_path"] for info in infos])
    if not len(dataset):
        where = dataset.ann_file or dataset.data_prefix.get("img_path")
        raise UserError(f"{where} has no usable images")
    check_one: Step = partial(_check_mask, len(dataset.metainfo["classes"]))
    if isinstance(dataset, CocoDataset):
        check_one = _check_image
    steps = dataset.pipeline.transforms
    views = [view.transforms for step in steps for view in getattr(step, "subroutines", [])]
    for transforms in (steps, *views):
        for index, step in enumerate(transforms):
            kind = type(step).__name__  # another one, "partial", in a second check
            if kind in ("LoadImageFromFile", "LoadAnnotations"):
                transforms[index] = partial(_load, step)
            if kind == "LoadAnnotations":
                transforms.insert(index + 1, check_one)


def _load(step: Step, results: dict[str, Any]) -> dict[str, Any]:
    try:
        return step(results)
    except Exception as error:  # of OpenCV, Pillow, pycocotools, ...
        what, path = "image", results["img_path"]
        if type(step).__name__ == "LoadAnnotations":
            what = "the annotations of image"
            if results.get("seg_map_path"):
                what, path = "mask", results["seg_map_path"]
        reason = reason_of(error)
        if isinstance(error, KeyError) and reason == "'mask'":
            reason = "they have no segmentation; use a detector without masks"
        raise UserError(f"{what} {path} cannot be read: {reason}") from None


def _check_image(results: dict[str, Any]) -> dict[str, Any]:
    recorded, found = (results["height"], results["width"]), tuple(results["ori_shape"])
    if recorded != found:
        raise UserError(
            f"image {results['img_path']} has {found[1]} x {found[0]} pixels, the annotation file "
            f"gives {recorded[1]} x {recorded[0]}: "
            f"{_of_turned(results['img_path'], recorded) or 'correct its width and height'}"
        )
    return results


def _tell_values(dataset: BaseSegDataset, infos: list[dict[str, Any]]) -> None:
    """Look at some masks: warn of classes that they lack; UserError if all pixels are ignored."""
    found: set[int] = set()
    for path in [info["seg_map_path"] for info in infos if info.get("seg_map_path")]:
        try:
            with Image.open(path) as image:
                if image.mode in ("L", "P", "1"):  # others are refused on loading
                    found |= {*np.unique(np.asarray(image)).tolist()}
        except OSError:  # told on loading
            continue
    first, classes = int(bool(dataset.reduce_zero_label)), dataset.metainfo["classes"]
    mapped = {(dataset.label_map or {}).get(value, value) for value in found}
    used = {value - first for value in mapped - {255}} - {-1}
    where = dataset.data_prefix.get("seg_map_path")
    values = some(map(str, sorted(found)), 8)
    if found and not used:
        line = (
            f"{where}: the {len(infos)} masks looked at hold only {values}, which are ignored "
            "pixels: masks hold the indices of the classes"
        )
        if len(infos) == len(dataset):
            raise UserError(line)
        print_log(line, "current", logging.WARNING)
    if found == {0, 255} and len(classes) > 1:
        print_log(
            f"{where}: the masks hold 0 and 255 only, and 255 is ignored: as a class, "
            "write its index", "current", logging.WARNING,
        )  # fmt: skip
    missing = [name for index, name in enumerate(classes) if index not in used]
    if used and missing:
        print_log(
            f"{where}: {len(infos)} masks looked at have no pixel of {len(missing)} of the "
            f"{len(classes)} classes: {some(missing)}; their values: {values}",
            "current", logging.WARNING,
        )  # fmt: skip


def _tell_turned(dataset: Any, paths: list[str]) -> None:
    """Look at some images: warn if they are turned as their EXIF metadata say."""
    steps = dataset.pipeline.transforms
    if any("ignore_orientation" in str(getattr(step, "color_type", "")) for step in steps):
        return
    turned = [path for path in paths if _orientation(path) > 1]
    if turned:
        print_log(
            f"{len(turned)} of {len(paths)} images looked at are turned as their EXIF metadata "
            f"say, so their annotations have to be of the turned image: {some(turned, 3)}",
            "current", logging.WARNING,
        )  # fmt: skip


def _orientation(path: str) -> int:
    """Return the orientation in EXIF metadata: 1 is upright, 5 to 8 swap height and width."""
    try:
        with Image.open(path) as image:
            return orientation_of(image)
    except OSError:  # told on loading
        return 1


def _of_turned(path: str, size: tuple[int, int]) -> str:
    """Return a hint if annotations of that height and width are of the image before turning it."""
    with Image.open(path) as image:
        if image.size[::-1] != size or _orientation(path) < 5:
            return ""
    return (
        "they are of the image before it is turned as its EXIF metadata say, as everywhere here; "
        "annotate it upright, or give LoadImageFromFile(color_type='color_ignore_orientation')"
    )


def _check_mask(num_classes: int, results: dict[str, Any]) -> dict[str, Any]:
    path, mask = results["seg_map_path"], results["gt_seg_map"]
    height, width = results["ori_shape"]
    with Image.open(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise UserError(
                f"mask {path} is an image of mode {image.mode}: masks have one 8-bit channel with "
                "the index of the class"
            )
    if mask.shape != (height, width):
        hint = _of_turned(results["img_path"], mask.shape)
        raise UserError(
            f"mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x "
            f"{height}" + (hint and f": {hint}")
        )
    unknown = np.unique(mask[(mask >= num_classes) & (mask != 255)])
    if len(unknown):
        # the values in the file, where 0 may mean no class
        first = int(bool(results.get("reduce_zero_label")))
        raise UserError(
            f"mask {path} has the value {unknown[0] + first}, but there are {num_classes} classes "
            f"({first} to {num_classes - 1 + first}); ignored pixels are 255"
        )
    return results


def _sizes(images: Any) -> set[tuple[int, ...]]:
    return {tuple(image.shape) for image in images}


class SameSizes(Hook):
    """Refuses a batch of images of different sizes, which a segmentor cannot test at once."""

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, part: str = "val"
    ) -> None:
        views = data_batch["inputs"]  # with test-time augmentation, a list for each view
        views = [views] if isinstance(views[0], torch.Tensor) else views
        sizes = next((found for view in views if len(found := _sizes(view)) > 1), set())
        preprocessor = getattr(runner.model, "module", runner.model).data_preprocessor
        if len(sizes) > 1 and not getattr(preprocessor, "test_cfg", None):
            heights = " and ".join(f"{size[-1]} x {size[-2]}" for size in sorted(sizes)[:2])
            samples = data_batch["data_samples"]
            samples = samples[0] if isinstance(samples[0], list | tuple) else samples
            names = [sample.img_path for sample in samples]
            raise UserError(
                f"images of one batch differ in size ({heights}; {some(names, 2)}): "
                f"set {part}_dataloader.batch_size=1"
            )

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.before_val_iter(runner, batch_idx, data_batch, "test")
