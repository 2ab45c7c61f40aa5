"""From weights to a model: names, heads and classes have to fit.

Names of other projects become the model's own in models.pretrained.checkpoint_filter_fn, which timm
calls, too.
"""

import logging
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.reading import (
    classes_in,
    flags_in,
    numbered_as_saved,
    read_checkpoint,
    weights_in,
)
from checkpoints.sources import local_file
from config.flags import FinetuneConfig
from models import pretrained
from runtime.distributed import SINGLE_PROCESS, DistributedContext
from runtime.errors import UserError

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]


def load_exactly(
    model: nn.Module, weights: Weights, path: str | Path, may_lack: frozenset[str] = frozenset()
) -> None:
    """Load a state dict, read from `path`, that fits the model in all names and shapes.

    Names in `may_lack` may be missing; they keep the model's values. Raises UserError listing the
    mismatches, or the weights that have NaN or inf or are integers.
    """
    check_fit(model.state_dict(), weights, path, may_lack)
    parameters = dict(model.named_parameters()).keys()
    # masks among the buffers may be infinite
    bad = [n for n, w in weights.items() if (~w.isfinite() if n in parameters else w.isnan()).any()]
    if bad:
        raise UserError(f"checkpoint {path} can't be used: not finite: {_first(bad)}")
    bad = [name for name in parameters & weights.keys() if not weights[name].is_floating_point()]
    if bad:
        raise UserError(f"checkpoint {path} can't be used: not floating point: {_first(bad)}")
    model.load_state_dict(weights, strict=False)


def leave_out_frozen(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a checkpoint without frozen parameters, of which `left_out` has the 2-norms."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    weights = {name: value for name, value in saved["model"].items() if name not in frozen}
    norms = {name: value.double().norm().item() for name, value in frozen.items()}
    return saved | {"model": weights, "left_out": norms}


def load_saved(
    model: nn.Module,
    checkpoint: dict[str, Any],
    weights: Weights,
    path: str | Path,
    context: DistributedContext = SINGLE_PROCESS,
) -> None:
    """`load_exactly` the weights of a checkpoint; those it leaves out are read from --finetune."""
    left_out = checkpoint.get("left_out") or {}
    if not left_out:
        load_exactly(model, weights, path)
        return
    flags, own = flags_in(checkpoint), model.state_dict()
    if not isinstance(left_out, dict) or not left_out.keys() <= own.keys():
        raise UserError(f"checkpoint {path} is of another model: it leaves out other weights")
    known = {f.name: flags[f.name] for f in fields(FinetuneConfig) if f.name in flags}
    classes = classes_in(checkpoint, path)
    logger.info("%s leaves out %d frozen weights", path, len(left_out))
    load_start_weights(model, FinetuneConfig(**known), classes, context, named=False)
    for name, norm in left_out.items():
        if not math.isclose(own[name].double().norm().item(), norm, rel_tol=1e-6):
            raise UserError(
                f"checkpoint {path} leaves out {name}, which is another one in its start weights, "
                f"{known['finetune']}"
            )
    load_exactly(model, weights, path, frozenset(left_out))


def check_fit(
    expected: Weights, weights: Weights, path: str | Path, may_lack: frozenset[str] = frozenset()
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


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def load_start_weights(
    model: nn.Module,
    config: FinetuneConfig,
    classes: list[str],
    context: DistributedContext,
    named: bool = True,
) -> None:
    """Load --finetune into `model`; UserError if more than the head doesn't fit.

    The head's rows are matched by `classes`, if these are `named`.
    """
    path = local_file(config.finetune, context)
    checkpoint = read_checkpoint(path, model)
    found = weights_in(checkpoint, path, config.model_key, config.model_prefix)
    base_model = getattr(model, "base_model", None)
    if base_model is not None and not any("base_model." in name for name in found):
        _load_base_model(base_model, found, path)
        return
    # of a detector or segmentor, the backbone without the norms of its outputs
    own = {k: v for k, v in found.items() if re.match(r"backbone\.(?!norm\d)", k)}
    weights = own_names(own or found, model)
    heads, known = heads_of(model), classes_in(checkpoint, path)
    # without names in the file, the order of its run is assumed
    known = known or numbered_as_saved(classes, flags_in(checkpoint))
    weights, done = _fit_head(weights, known, classes, named, heads)
    may_lack = _head_names(heads)
    if any(name.startswith("backbone.") for name in found):
        may_lack |= {"norm.weight", "norm.bias"}
        if not may_lack & weights.keys():
            done = "norm and head are new"
    load_exactly(model, weights, path, frozenset(may_lack))
    logger.info("start weights from %s%s", path, f"; {done}" if done else "")


def _load_base_model(base_model: Any, found: Weights, path: Path) -> None:
    """Load the weights of a classifier into the part of a model that was one; its head is new."""
    heads = tuple(f"{head}." for head in heads_of(base_model))
    weights = pretrained.checkpoint_filter_fn(found, base_model)
    weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
    own_head = {name for name in base_model.state_dict() if name.startswith(heads)}
    load_exactly(base_model, weights, path, frozenset(own_head))
    logger.info("start weights of base_model from %s", path)


def own_names(weights: Weights, model: nn.Module) -> Weights:
    """Return weights under the model's own names, which other projects or versions may differ from.

    A model may have names of its own to change, in `released_names(weights)`.
    """
    weights = pretrained.checkpoint_filter_fn(weights, model)
    further = getattr(model, "released_names", None)
    return further(weights) if further else weights  # type: ignore[operator]


def _fit_head(
    weights: Weights, known: list[str], classes: list[str], named: bool, heads: tuple[str, ...]
) -> tuple[Weights, str]:
    """Fit the head to the data's classes; return the weights and what was done.

    For 1000 classes, an ImageNet-22K head becomes an ImageNet-1K head. Rows are matched by
    name to those of the file (`known`). A head for other classes is left out.
    """
    rows = len(weights.get(f"{heads[0]}.weight", classes))
    names = _head_names(heads) & weights.keys()
    without_head = {name: value for name, value in weights.items() if name not in names}
    if rows != len(classes):
        if len(classes) == 1000 and pretrained.is_imagenet22k(rows) and heads == ("head",):
            return pretrained.select_imagenet1k(weights), f"1000 of the head's {rows} rows"
        return without_head, f"a new head: {rows} classes in the file, {len(classes)} here"
    if known == classes or not named:
        return weights, ""
    if sorted(known) == sorted(classes):
        order = torch.tensor([known.index(name) for name in classes])
        ordered = {name: weights[name][order] for name in names}
        return weights | ordered, "the head's rows are reordered to the data's classes"
    return without_head, f"a new head: the file has other classes ({known[0]}, ...)"


def heads_of(source: Any) -> tuple[str, ...]:
    """Return the names of the classifier layers, usually one, of a timm model or pretrained_cfg."""
    cfg = getattr(source, "pretrained_cfg", source)
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    names = cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _head_names(heads: tuple[str, ...]) -> set[str]:
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def check_head(weights: Weights, model: nn.Module, classes: list[str], path: str | Path) -> None:
    """Refuse weights for another number of classes, if their head tells it."""
    bias = weights.get(f"{heads_of(model)[0]}.bias")
    if bias is not None and len(bias) != len(classes):
        raise UserError(f"checkpoint {path} has {len(bias)} classes, the data {len(classes)}")
