"""Classes and widths: those of the heads are those of the data and of the backbone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dense.configs import dicts
from runtime.errors import UserError, some

HEADS = ("bbox_head", "mask_head", "decode_head", "auxiliary_head")
"""Heads that tell the classes of the data; others have classes of their own."""
OTHERS = ("STDCHead",)
"""Types that stand in such a place, but tell edges."""


def check_heads(config: Any, parts: tuple[str, ...]) -> None:
    """Raise UserError if a head has another number of classes than the data of one of the parts.

    Otherwise it would be trained on labels that never occur, or stop at one that it lacks.
    """
    if "language_model" in config.model:  # such a detector tells any class
        return
    for part in parts:
        data = (config.get(f"{part}_dataloader") or {}).get("dataset")
        for classes in all_classes(data, config.default_scope):
            for name, head in _heads(config.model):
                _check_head(name, head, classes, part)


def _check_head(name: str, head: Any, classes: list[str], part: str) -> None:
    count = len(classes)
    if head["num_classes"] != count:
        raise UserError(
            f"{name}.num_classes is {head['num_classes']}, the {part} data have {count} classes "
            f"({some(classes)}): set both alike"
        )
    for key, settings in head.items():
        given = settings.get("class_weight") if isinstance(settings, dict) else None
        # heads with a class for nothing give it a weight, too
        if isinstance(given, list | tuple) and len(given) not in (count, count + 1):
            raise UserError(
                f"{name}.{key}.class_weight has {len(given)} numbers for {count} classes"
            )
    if count == 1 and _is_softmax(head):
        raise UserError(
            f"{name} has one class, whose softmax is always 1, so nothing is learnt: add a class "
            "for the ground, or give out_channels=1 and losses with use_sigmoid=True"
        )


def all_classes(data: Any, scope: str) -> Iterator[list[str]]:
    """Yield the classes of each data set inside wrappers, if they are those of heads."""
    for found in dicts(data):
        kind = _kind(found, scope)
        names = [base.__name__ for base in getattr(kind, "__mro__", ())]
        is_known = {"CocoDataset", "BaseSegDataset"} & {*names}
        if is_known and "CocoPanopticDataset" not in names and (given := classes_of(found, scope)):
            _check_palette(found, given)
            yield given


def _check_palette(dataset: Any, classes: list[str]) -> None:
    palette = (dataset.get("metainfo") or {}).get("palette")
    if isinstance(palette, list | tuple) and len(palette) not in (0, len(classes)):
        raise UserError(f"the palette has {len(palette)} colours for {len(classes)} classes")


def classes_of(dataset: Any, scope: str) -> list[str]:
    """Return the classes of a data set's config, by default those of its type in mmdet or mmseg.

    Raises UserError for one word instead of a sequence or of a file with a class per line.
    """
    given = (dataset.get("metainfo") or {}).get("classes")
    if isinstance(given, str) and Path(given).is_file():
        return Path(given).read_text(encoding="utf-8").splitlines()
    if isinstance(given, str):
        raise UserError(f"classes is one word: write ({given!r},)")
    return list(given or getattr(_kind(dataset, scope), "METAINFO", {}).get("classes") or [])


def _kind(dataset: Any, scope: str) -> Any:
    from mmdet.registry import DATASETS as MMDET
    from mmseg.registry import DATASETS as MMSEG

    kind = dataset.get("type")
    registry = MMDET if scope == "mmdet" else MMSEG
    return registry.get(kind) if isinstance(kind, str) else kind


def _heads(model: Any, name: str = "model") -> Iterator[tuple[str, Any]]:
    """Yield the parts of a model that tell the classes of the data, with their names."""
    items = model.items() if isinstance(model, dict) else enumerate(model)
    for key, value in items:
        inner = f"{name}.{key}"
        several = value if isinstance(value, list | tuple) else [value]
        for number, head in enumerate(several) if key in HEADS else ():
            is_head = isinstance(head, dict) and isinstance(head.get("num_classes"), int)
            if is_head and head.get("type") not in OTHERS:
                yield f"{inner}.{number}" if head is not value else inner, head
        if key not in HEADS and isinstance(value, dict | list | tuple):
            yield from _heads(value, inner)


def _is_softmax(head: Any) -> bool:
    """Return whether the head of a segmentor tells its only class by a softmax."""
    losses = [loss for loss in dicts(head.get("loss_decode")) if "type" in loss]
    by_sigmoid = all(loss.get("use_sigmoid") for loss in losses) and bool(losses)
    is_segmentor = "loss_decode" in head or "dropout_ratio" in head or "align_corners" in head
    has_queries = "num_queries" in head  # and a class for nothing
    return is_segmentor and not by_sigmoid and not has_queries


def check_widths(config: Any, widths: list[int]) -> None:
    """Raise UserError if neck or heads of a model's config expect other maps than there are."""
    names = ("neck",) if config.get("neck") else ("decode_head", "auxiliary_head")
    for name in names:
        part = config.get(name)
        for inner in part if isinstance(part, list | tuple) else [part]:
            found: Any = (inner or {}).get("in_channels")
            index: Any = (inner or {}).get("in_index")
            several = isinstance(found, list | tuple)
            if found is None or not several and not isinstance(index, int):
                continue
            try:
                own = [widths[i] for i in index or range(len(widths))] if several else widths[index]
            except IndexError:
                own = []
            if (list(found) if several else found) != own:
                raise UserError(
                    f"model.{name}.in_channels is {found}, the maps of the backbone have "
                    f"{widths} channels"
                )
