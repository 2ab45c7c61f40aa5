"""--tta: test-time augmentation, merging the predictions for several views of each image."""

from typing import Any

from runtime.errors import UserError

SIZES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Multiples of the size in the test pipeline, as published."""


def use_several_views(config: Any) -> None:
    """Change `config` in place: six sizes for segmentors, one for detectors, each mirrored, too.

    Raises UserError for detectors with masks, which mmdet cannot merge.
    """
    is_detector = config.default_scope == "mmdet"
    if is_detector and (config.model.get("roi_head") or {}).get("mask_head"):
        raise UserError("--tta: mmdet merges boxes only, and this detector has masks too")
    dataset = config.test_dataloader.dataset
    if "pipeline" not in dataset:
        raise UserError(
            f"--tta: {dataset.type} has no pipeline of its own; test its data sets alone"
        )
    first, *middle, last = dataset.pipeline
    resizes = [step for step in middle if step.type == "Resize"]
    others = [step for step in middle if step.type != "Resize"]
    flips = [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)]
    if is_detector:
        if "meta_keys" in last:
            last = {**last, "meta_keys": (*last["meta_keys"], "flip", "flip_direction")}
        merged = {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}
        wrapper = {"type": "DetTTAModel", "tta_cfg": merged}
    else:
        resizes = [_resized(resizes, size) for size in SIZES]
        wrapper = {"type": "SegTTAModel"}
    # a view takes one step of each list; annotations are loaded after resizing, as without --tta
    choices = filter(None, [resizes, flips, *([step] for step in others), [last]])
    dataset.pipeline = [first, {"type": "TestTimeAug", "transforms": list(choices)}]
    config.model = {**wrapper, "module": config.model}


def _resized(resizes: list[Any], size: float) -> dict[str, Any]:
    """Return the pipeline's Resize, or that of the image if it has none, times a factor."""
    if not resizes:
        return {"type": "Resize", "scale_factor": size, "keep_ratio": True}
    return {**resizes[0], "scale": tuple(int(side * size) for side in resizes[0].scale)}
