"""Checks that annotations fit the config and the images; errors name the file.

Without them mmdet and mmseg train on wrong labels (categories in another order than the config's
classes) or end in an obscure error (a mask value without a class stops a GPU).
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from PIL import Image

from runtime.errors import UserError, reason_of

Step = Callable[[dict[str, Any]], dict[str, Any]]  # a transform of a data set's pipeline


def check(dataset: Any) -> None:
    """Check a data set, and make it check each image on loading.

    Raises UserError if there are no images, or the annotation file does not fit the config; on
    loading, if a file cannot be read, or the image or mask does not fit.
    """
    # wrappers such as ConcatDataset and RepeatDataset
    for inner in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if inner is not None:
            check(inner)
    if not isinstance(dataset, CocoDataset | BaseSegDataset):
        return
    if not len(dataset):
        where = dataset.ann_file or dataset.data_prefix.get("img_path")
        raise UserError(f"{where} has no usable images")
    check_one: Step = partial(_check_mask, len(dataset.metainfo["classes"]))
    if isinstance(dataset, CocoDataset):
        _check_annotations(dataset)
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


def _check_categories(path: str, names: list[str], classes: list[str]) -> None:
    for listed, where in ((classes, "the config's classes"), (names, path)):
        repeated = [name for name in listed if listed.count(name) > 1]
        if repeated:
            raise UserError(f"{where}: category {repeated[0]} is listed more than once")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(
            f"{path} has no category {', '.join(missing[:3])}, which the config has among its "
            f"classes; its categories: {', '.join(names[:10])}"
        )
    ordered = [name for name in names if name in classes]
    if ordered != classes:
        raise UserError(
            f"{path} has the categories in another order than the config's classes, "
            f"and labels follow the file: write classes = {tuple(ordered)}"
        )


def _check_annotations(dataset: CocoDataset) -> None:
    path, classes = dataset.ann_file, list(dataset.metainfo["classes"])
    coco = dataset.COCOAPI(path)
    _check_categories(path, [c["name"] for c in coco.dataset["categories"]], classes)
    annotations = coco.dataset.get("annotations", [])
    for key, known in (("category_id", coco.cats), ("image_id", coco.imgs)):
        unknown = [a for a in annotations if a[key] not in known]
        if unknown:
            raise UserError(
                f"{path}: annotation {unknown[0]['id']} has the unknown {key} {unknown[0][key]} "
                f"({len(unknown)} such annotations)"
            )
    others = sum(coco.cats[a["category_id"]]["name"] not in classes for a in annotations)
    images = [coco.imgs[a["image_id"]] for a in annotations]
    limits = np.array([(image["width"], image["height"]) for image in images]).reshape(-1, 2) + 1
    corners, sizes = np.hsplit(np.array([a["bbox"] for a in annotations]).reshape(-1, 4), 2)
    empty = (sizes.min(1) < 1).sum()
    beyond = (corners + sizes > limits).any(1).sum()
    if annotations and empty == len(annotations):
        raise UserError(
            f"{path}: no box is at least a pixel wide and high; boxes are (x, y, width, height) in "
            "pixels"
        )
    warnings = {
        "have categories outside the config's classes and are ignored": others,
        "have a box of less than a pixel and are ignored": empty,
        "reach beyond their image; boxes are (x, y, width, height) in pixels": beyond,
    }
    lines = [f"{n} of {len(annotations)} annotations {what}" for what, n in warnings.items() if n]
    for line in lines if annotations else ["no annotations: all images are background"]:
        print_log(f"{path}: {line}", "current", logging.WARNING)


def _check_image(results: dict[str, Any]) -> dict[str, Any]:
    recorded, found = (results["height"], results["width"]), tuple(results["ori_shape"])
    if recorded != found:
        raise UserError(
            f"image {results['img_path']} has {found[1]} x {found[0]} pixels, the annotation file "
            f"gives {recorded[1]} x {recorded[0]}: correct its width and height"
        )
    return results


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
        raise UserError(
            f"mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x "
            f"{height}"
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
