"""Weights into a model: names, heads and classes that fit, or an error that lists what does not."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.reading import classes_in, read_checkpoint, weights_in
from checkpoints.sources import local_file
from config import FinetuneConfig
from models.pretrained import (
    checkpoint_filter_fn,
    imagenet1k_in_22k,
    is_imagenet22k,
    select_imagenet1k,
)
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from utils import numbered_classes

logger = logging.getLogger(__name__)


def load_exactly(
    model: nn.Module,
    weights: dict[str, Tensor],
    path: str | Path,
    may_lack: frozenset[str] = frozenset(),
) -> None:
    """Loads weights that have to fit the model in every name and shape, and be finite.

    Args:
        model: Takes them.
        weights: A state dict.
        path: Where it comes from, for messages.
        may_lack: Names that keep the model's own values where the weights have none.

    Raises:
        UserError: the mismatches, or the weights that are not finite, are listed.
    """
    check_fit(model.state_dict(), weights, path, may_lack)
    learnt = dict(model.named_parameters()).keys()
    bad = [
        name
        for name, value in weights.items()
        # masks among the buffers may be infinite
        if value.isnan().any() or (name in learnt and not value.isfinite().all())
    ]
    if bad:
        raise UserError(f"checkpoint {path} is of no use: not finite is {_first(bad)}")
    other = [name for name in learnt & weights.keys() if not weights[name].is_floating_point()]
    if other:
        raise UserError(f"checkpoint {path} is of no use: no floating point is {_first(other)}")
    model.load_state_dict(weights, strict=False)


def check_fit(
    expected: dict[str, Tensor],
    weights: dict[str, Tensor],
    path: str | Path,
    may_lack: frozenset[str] = frozenset(),
) -> None:
    """Raises UserError listing where `weights` differ from `expected` in names and shapes."""
    problems = {
        "lacks": sorted(expected.keys() - weights.keys() - may_lack),
        "has the unknown": sorted(weights.keys() - expected.keys()),
        "has another shape of": [
            f"{name} ({list(weights[name].shape)} instead of {list(value.shape)})"
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        shown = "; ".join(f"{what} {_first(names)}" for what, names in problems.items() if names)
        raise UserError(f"checkpoint {path} is of another model: it {shown}")


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def load_start_weights(
    model: nn.Module, config: FinetuneConfig, classes: list[str], context: DistributedContext
) -> None:
    """Loads --finetune into `model`; raises UserError where more than the head does not fit."""
    path = local_file(config.finetune, context)
    checkpoint = read_checkpoint(path, model)
    found = weights_in(checkpoint, path, config.model_key, config.model_prefix)
    weights = checkpoint_filter_fn(_of_backbone(found), model)
    known = classes_in(checkpoint, path)
    weights, done = _fit_head(weights, known, classes, heads_of(model))
    may_lack = _head_names(heads_of(model))
    if any(name.startswith("backbone.") for name in found):
        may_lack |= {"norm.weight", "norm.bias"}
        if not may_lack & weights.keys():
            done = "the norm and the head of the backbone are initialised"
    load_exactly(model, weights, path, frozenset(may_lack))
    logger.info("start weights from %s%s", path, f"; {done}" if done else "")


def _of_backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a detector's or segmentor's weights, without the norms of its maps."""
    own = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    return {k: v for k, v in own.items() if not re.match(r"backbone\.norm\d", k)} or weights


def _fit_head(
    weights: dict[str, Tensor], known: list[str], classes: list[str], heads: tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """Fits the rows of the head to the data's classes; returns the weights and what was done.

    The head of an ImageNet-22K model becomes one of ImageNet-1K for 1000 classes. Where the file
    names its classes (`known`), rows are matched by name. A head of other classes is left out.
    """
    head = weights.get(f"{heads[0]}.weight")
    names = _head_names(heads) & weights.keys()
    without_head = {name: value for name, value in weights.items() if name not in names}
    if head is not None and len(head) != len(classes):
        rows = len(head)
        to_imagenet1k = len(classes) == len(imagenet1k_in_22k()) and is_imagenet22k(rows)
        if to_imagenet1k and heads == ("head",):
            return select_imagenet1k(weights), f"the head's 1000 rows are taken out of {rows}"
        return without_head, f"a new head: {rows} classes in the file, {len(classes)} here"
    if not known or known == classes or numbered_classes(len(classes)) in (known, classes):
        return weights, ""  # the same, or the file or the data does not name its classes
    if sorted(known) == sorted(classes):
        order = torch.tensor([known.index(name) for name in classes])
        ordered = {name: weights[name][order] for name in names}
        return weights | ordered, "the head's rows are put into the order of the data's classes"
    return without_head, f"a new head: the file's classes are others ({known[0]}, ...)"


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's last layers, mostly one."""
    return heads_by_cfg(getattr(model, "pretrained_cfg", {}))


def heads_by_cfg(cfg: Any) -> tuple[str, ...]:
    """The same by its settings in timm, a dict or a PretrainedCfg."""
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    names = cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _head_names(heads: tuple[str, ...]) -> set[str]:
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def check_classes(checkpoint: dict[str, Any], classes: list[str], path: str | Path) -> None:
    """Refuses a checkpoint of other classes; one that does not name its classes passes."""
    saved = classes_in(checkpoint, path) or classes
    if len(saved) == len(classes) and numbered_classes(len(classes)) in (saved, classes):
        return
    if saved != classes:
        raise UserError(
            f"checkpoint {path} knows {len(saved)} classes ({', '.join(saved[:5])}, ...), the data "
            f"has {len(classes)} ({', '.join(classes[:5])}, ...): start from its "
            "weights by --finetune, in another --output_dir"
        )


def check_head(
    weights: dict[str, Tensor], model: nn.Module, classes: list[str], path: str | Path
) -> None:
    """Refuses weights of another number of classes, where that can be told from their head."""
    bias = weights.get(f"{heads_of(model)[0]}.bias")
    if bias is not None and len(bias) != len(classes):
        raise UserError(f"checkpoint {path} has {len(bias)} classes, the data {len(classes)}")
