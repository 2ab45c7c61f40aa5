"""Annotations that do not fit the config or their images: an error that names the file.

mmdet and mmseg train on them all the same, or end in an error of PyTorch: categories in another
order than the config's classes get each other's labels, and a mask's value without a class stops a
GPU.
"""

import logging
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from PIL import Image

from runtime.errors import UserError, reason_of


def check(dataset: Any) -> None:
    """Checks a data set as a whole now, and each of its images when it is loaded.

    Raises:
        UserError: there is no image, or the categories of the annotation file are not those of the
            config; on loading, as Guarded, CheckImage and CheckMask.
    """
    for inner in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if inner is not None:  # of a wrapper such as ConcatDataset or RepeatDataset
            check(inner)
    if not isinstance(dataset, CocoDataset | BaseSegDataset):
        return
    where = dataset.ann_file or dataset.data_prefix.get("img_path")
    if not len(dataset):
        raise UserError(f"{where} has no image that the data set could use")
    check_one: BaseTransform = CheckMask(len(dataset.metainfo["classes"]))
    if isinstance(dataset, CocoDataset):
        _check_categories(dataset)
        check_one = CheckImage()
    views = [
        sub for step in dataset.pipeline.transforms for sub in getattr(step, "subroutines", [])
    ]
    for pipeline in (dataset.pipeline, *views):
        _check_images(pipeline.transforms, check_one)


def _check_images(transforms: list[Any], check_one: BaseTransform) -> None:
    """Guards the steps that load, and puts the check behind that of annotations; once."""
    for index, step in enumerate(transforms):
        if type(step).__name__ in ("LoadImageFromFile", "LoadAnnotations"):
            transforms[index] = Guarded(step)
            if type(step).__name__ == "LoadAnnotations":
                transforms.insert(index + 1, check_one)


class Guarded(BaseTransform):
    """A step that loads: whatever it fails by, a UserError names the file."""

    def __init__(self, step: BaseTransform) -> None:
        self.step = step

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.step(results)
        except Exception as error:  # of OpenCV, Pillow, pycocotools, ...
            what, path = "image", results["img_path"]
            if type(self.step).__name__ == "LoadAnnotations":
                what = "the annotations of image"
                if results.get("seg_map_path"):
                    what, path = "mask", results["seg_map_path"]
            reason = reason_of(error)
            if isinstance(error, KeyError) and reason == "'mask'":
                reason = "they have no segmentation; a detector of boxes alone needs none"
            raise UserError(f"{what} {path} cannot be read: {reason}") from None


def _check_categories(dataset: CocoDataset) -> None:
    from pycocotools.coco import COCO

    coco = dataset.COCOAPI(dataset.ann_file)
    assert isinstance(coco, COCO)
    classes = list(dataset.metainfo["classes"])
    names = [category["name"] for category in coco.dataset["categories"]]
    for listed, where in ((classes, "the config's classes"), (names, dataset.ann_file)):
        twice = next((name for name in listed if listed.count(name) > 1), None)
        if twice:
            raise UserError(f"{twice} stands more than once among the categories of {where}")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(
            f"{dataset.ann_file} has no category {', '.join(missing[:3])}, which the config has "
            f"among its classes; its categories: {', '.join(names[:10])}"
        )
    ordered = [name for name in names if name in classes]
    if ordered != classes:
        raise UserError(
            f"{dataset.ann_file} has the categories in another order than the config's classes, "
            f"and labels follow the file: write classes = {tuple(ordered)}"
        )
    annotations = coco.dataset.get("annotations", [])
    unknown = [a for a in annotations if a["category_id"] not in coco.cats]
    if unknown:
        raise UserError(
            f"{dataset.ann_file}: annotation {unknown[0]['id']} has the category_id "
            f"{unknown[0]['category_id']}, which is none of its categories "
            f"({len(unknown)} such annotations)"
        )
    strays = [a for a in annotations if a["image_id"] not in coco.imgs]
    if strays:
        raise UserError(
            f"{dataset.ann_file}: annotation {strays[0]['id']} has the image_id "
            f"{strays[0]['image_id']}, which is none of its images ({len(strays)} such annotations)"
        )
    others = [a for a in annotations if coco.cats[a["category_id"]]["name"] not in classes]
    empty = [a for a in annotations if min(a["bbox"][2:]) < 1]
    if annotations and len(empty) == len(annotations):
        raise UserError(
            f"{dataset.ann_file}: no box has a width and a height of a pixel or more; boxes are "
            "(x, y, width, height) in pixels"
        )
    beyond = [a for a in annotations if _reaches_beyond(a["bbox"], coco.imgs[a["image_id"]])]
    told = {
        "are of categories outside the config's classes, and left out": len(others),
        "have a box of less than a pixel, and are left out": len(empty),
        "reach beyond their image, where boxes are (x, y, width, height) in pixels": len(beyond),
    }
    lines = [f"{n} of {len(annotations)} annotations {what}" for what, n in told.items() if n]
    if not annotations:
        lines = ["there is no annotation: all images are background"]
    for line in lines:
        print_log(f"{dataset.ann_file}: {line}", "current", logging.WARNING)


def _reaches_beyond(box: list[float], image: dict[str, Any]) -> bool:
    x, y, width, height = box
    return x + width > image["width"] + 1 or y + height > image["height"] + 1


class CheckImage(BaseTransform):
    """Raises UserError where an image is not of the size that the annotation file gives."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        recorded, found = (results["height"], results["width"]), tuple(results["ori_shape"])
        if recorded != found:
            raise UserError(
                f"image {results['img_path']} has {found[1]} x {found[0]} pixels, the annotation "
                f"file gives {recorded[1]} x {recorded[0]}: correct its width and height"
            )
        return results


class CheckMask(BaseTransform):
    """Raises UserError where a mask is not of its image's size, or has values without a class."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path, mask = results["seg_map_path"], results["gt_seg_map"]
        with Image.open(path) as image:
            mode = image.mode
        if mode not in ("L", "P", "1"):
            raise UserError(
                f"mask {path} is an image of mode {mode}: masks have one channel of 8 bits, whose "
                "values are classes"
            )
        if mask.shape != tuple(results["ori_shape"]):
            height, width = results["ori_shape"]
            raise UserError(
                f"mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x "
                f"{height}"
            )
        outside = np.unique(mask[(mask >= self.num_classes) & (mask != 255)])
        if len(outside):
            # as they stand in the file, where 0 may mean no class
            first = int(bool(results.get("reduce_zero_label")))
            raise UserError(
                f"mask {path} has the value {outside[0] + first}, but there are {self.num_classes} "
                f"classes ({first} to {self.num_classes - 1 + first}); pixels to be ignored are 255"
            )
        return results
