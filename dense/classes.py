"""The number of classes of the heads: that of the data."""

from collections.abc import Iterator
from typing import Any

from dense.configs import dicts
from runtime.errors import UserError, some


def check_heads(config: Any, parts: tuple[str, ...]) -> None:
    """Raise UserError if a head has another number of classes than the data of one of the parts.

    Otherwise it would be trained on labels that never occur, or stop at one that it lacks.
    """
    for part in parts:
        classes = _classes_of((config.get(f"{part}_dataloader") or {}).get("dataset"))
        for name, head in _heads(config.model) if classes else ():
            if head["num_classes"] != len(classes):
                raise UserError(
                    f"{name}.num_classes is {head['num_classes']}, the {part} data have "
                    f"{len(classes)} classes ({some(classes)}): set both alike"
                )
            if len(classes) == 1 and _is_softmax(head):
                raise UserError(
                    f"{name} has one class, whose softmax is always 1, so nothing is learnt: add a "
                    "class for the ground, or give out_channels=1 and losses with use_sigmoid=True"
                )


def _classes_of(data: Any) -> list[str]:
    """Return the classes of the first data set inside wrappers; [] if it does not give them."""
    for found in dicts(data):
        if found.get("metainfo") or "pipeline" in found:
            return classes_of(found)
    return []


def classes_of(dataset: Any) -> list[str]:
    """Return the classes of a data set's config, by default those of its type.

    Raises UserError for one word instead of a sequence.
    """
    from mmdet.registry import DATASETS as MMDET
    from mmseg.registry import DATASETS as MMSEG

    given = (dataset.get("metainfo") or {}).get("classes")
    if isinstance(given, str):
        raise UserError(f"classes is one word: write ({given!r},)")
    kind = dataset.get("type")
    known: Any = isinstance(kind, str) and (MMDET.get(kind) or MMSEG.get(kind))
    return list(given or getattr(known, "METAINFO", {}).get("classes") or [])


def _heads(model: Any, name: str = "model") -> Iterator[tuple[str, Any]]:
    """Yield the parts of a model that have a number of classes, with their names."""
    items = model.items() if isinstance(model, dict) else enumerate(model)
    for key, value in items:
        inner = f"{name}.{key}"
        if isinstance(value, dict) and isinstance(value.get("num_classes"), int):
            yield inner, value
        if isinstance(value, dict | list | tuple):
            yield from _heads(value, inner)


def _is_softmax(head: Any) -> bool:
    """Return whether the head of a segmentor tells its only class by a softmax."""
    losses = [loss for loss in dicts(head.get("loss_decode")) if "type" in loss]
    by_sigmoid = all(loss.get("use_sigmoid") for loss in losses) and bool(losses)
    is_segmentor = "loss_decode" in head or "dropout_ratio" in head or "align_corners" in head
    return is_segmentor and not by_sigmoid and head.get("out_channels") != 1
