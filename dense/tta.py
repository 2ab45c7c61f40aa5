"""--tta: testing at several views of each image, whose predictions are merged."""

from typing import Any

from runtime.errors import UserError

SIZES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the size in the test pipeline, as published


def use_several_views(config: Any) -> None:
    """Changes `config` in place: segmentors see six sizes, detectors one, each mirrored too.

    Raises:
        UserError: the detector has masks, which mmdet cannot merge.
    """
    is_detector = config.default_scope == "mmdet"
    if is_detector and (config.model.get("roi_head") or {}).get("mask_head"):
        raise UserError("--tta: mmdet merges boxes only, and this detector has masks too")
    dataset = config.test_dataloader.dataset
    first, *middle, last = dataset.pipeline
    resizes = [step for step in middle if step.type == "Resize"]
    others = [step for step in middle if step.type != "Resize"]
    flips = [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)]
    if is_detector:
        views = [resizes, flips]
        last = {**last, "meta_keys": (*last.get("meta_keys", ()), "flip", "flip_direction")}
        merged = {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}
        wrapper = {"type": "DetTTAModel", "tta_cfg": merged}
    else:
        views = [[_resized(resizes, size) for size in SIZES], flips]
        wrapper = {"type": "SegTTAModel"}
    # each view takes one of every list; the truth is loaded after resizing, as without the flag
    choices = [*filter(None, views), *([step] for step in others), [last]]
    dataset.pipeline = [first, {"type": "TestTimeAug", "transforms": choices}]
    config.model = {**wrapper, "module": config.model}


def _resized(resizes: list[Any], size: float) -> dict[str, Any]:
    """The pipeline's Resize by a factor; of a pipeline without one the image's own size."""
    if not resizes:
        return {"type": "Resize", "scale_factor": size, "keep_ratio": True}
    return {**resizes[0], "scale": tuple(int(side * size) for side in resizes[0].scale)}
