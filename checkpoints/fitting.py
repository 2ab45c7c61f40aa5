"""From weights to a model: names, heads and classes have to fit."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.reading import classes_in, read_checkpoint, weights_in
from checkpoints.sources import local_file
from config.flags import FinetuneConfig
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
    """Load a state dict, read from `path`, that fits the model in all names and shapes.

    Names in `may_lack` may be missing; they keep the model's values.

    Raises:
        UserError: listing the mismatches, or the weights that have NaN or inf or are integers.
    """
    check_fit(model.state_dict(), weights, path, may_lack)
    parameters = dict(model.named_parameters()).keys()
    bad = [
        name
        for name, value in weights.items()
        # masks among the buffers may be infinite
        if value.isnan().any() or (name in parameters and not value.isfinite().all())
    ]
    if bad:
        raise UserError(f"checkpoint {path} can't be used: not finite: {_first(bad)}")
    bad = [name for name in parameters & weights.keys() if not weights[name].is_floating_point()]
    if bad:
        raise UserError(f"checkpoint {path} can't be used: not floating point: {_first(bad)}")
    model.load_state_dict(weights, strict=False)


def check_fit(
    expected: dict[str, Tensor],
    weights: dict[str, Tensor],
    path: str | Path,
    may_lack: frozenset[str] = frozenset(),
) -> None:
    """Raise UserError listing where `weights` differ from `expected` in names and shapes."""
    problems = {
        "lacks": sorted(expected.keys() - weights.keys() - may_lack),
        "has unknown": sorted(weights.keys() - expected.keys()),
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
    """Load --finetune into `model`; UserError if more than the head doesn't fit."""
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
            done = "norm and head are new"
    load_exactly(model, weights, path, frozenset(may_lack))
    logger.info("start weights from %s%s", path, f"; {done}" if done else "")


def _of_backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's part of a detector or segmentor, without the norms of its outputs."""
    own = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    return {k: v for k, v in own.items() if not re.match(r"backbone\.norm\d", k)} or weights


def _fit_head(
    weights: dict[str, Tensor], known: list[str], classes: list[str], heads: tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """Fit the head to the data's classes; return the weights and what was done.

    For 1000 classes, an ImageNet-22K head becomes an ImageNet-1K head. If the file names its
    classes (`known`), rows are matched by name. A head for other classes is left out.
    """
    head = weights.get(f"{heads[0]}.weight")
    names = _head_names(heads) & weights.keys()
    without_head = {name: value for name, value in weights.items() if name not in names}
    if head is not None and len(head) != len(classes):
        rows = len(head)
        to_imagenet1k = len(classes) == len(imagenet1k_in_22k()) and is_imagenet22k(rows)
        if to_imagenet1k and heads == ("head",):
            return select_imagenet1k(weights), f"1000 of the head's {rows} rows"
        return without_head, f"a new head: {rows} classes in the file, {len(classes)} here"
    if not known or known == classes or numbered_classes(len(classes)) in (known, classes):
        return weights, ""  # the same classes, or unnamed ones
    if sorted(known) == sorted(classes):
        order = torch.tensor([known.index(name) for name in classes])
        ordered = {name: weights[name][order] for name in names}
        return weights | ordered, "the head's rows are reordered to the data's classes"
    return without_head, f"a new head: the file has other classes ({known[0]}, ...)"


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a timm model's classifier layers, usually one."""
    return heads_by_cfg(getattr(model, "pretrained_cfg", {}))


def heads_by_cfg(cfg: Any) -> tuple[str, ...]:
    """Like `heads_of`, by the model's pretrained_cfg, a dict or a PretrainedCfg."""
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    names = cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _head_names(heads: tuple[str, ...]) -> set[str]:
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def check_classes(checkpoint: dict[str, Any], classes: list[str], path: str | Path) -> None:
    """Refuse a checkpoint of other classes; one that doesn't name its classes passes."""
    saved = classes_in(checkpoint, path) or classes
    if len(saved) == len(classes) and numbered_classes(len(classes)) in (saved, classes):
        return
    if saved != classes:
        raise UserError(
            f"checkpoint {path} has {len(saved)} classes ({', '.join(saved[:5])}, ...), the data "
            f"{len(classes)} ({', '.join(classes[:5])}, ...): to train on, use --finetune with "
            "another --output_dir"
        )


def check_head(
    weights: dict[str, Tensor], model: nn.Module, classes: list[str], path: str | Path
) -> None:
    """Refuse weights for another number of classes, if their head tells it."""
    bias = weights.get(f"{heads_of(model)[0]}.bias")
    if bias is not None and len(bias) != len(classes):
        raise UserError(f"checkpoint {path} has {len(bias)} classes, the data {len(classes)}")
