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
from timm.models import adapt_input_conv
from torch import Tensor, nn

from checkpoints.reading import (
    classes_in,
    flags_in,
    heads_of,
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


def leave_out(saved: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return a checkpoint without these weights, of which `left_out` has the 2-norms."""
    norms = {name: saved["model"][name].double().norm().item() for name in names}
    weights = {name: value for name, value in saved["model"].items() if name not in names}
    return saved | {"model": weights, "left_out": norms}


def load_saved(
    model: nn.Module,
    checkpoint: dict[str, Any],
    weights: Weights,
    path: str | Path,
    context: DistributedContext = SINGLE_PROCESS,
    start: FinetuneConfig | None = None,
) -> None:
    """`load_exactly` the weights of a checkpoint, and those that it has left out.

    The latter are read from `start`, if it gives weights, or from --finetune of its run.
    """
    left_out = _load_left_out(model, checkpoint, path, context, start)
    load_exactly(model, weights, path, left_out)


def _load_left_out(
    model: nn.Module,
    checkpoint: dict[str, Any],
    path: str | Path,
    context: DistributedContext,
    start: FinetuneConfig | None = None,
) -> frozenset[str]:
    """Load the weights that a checkpoint has left out; return their names.

    Raises UserError if its start weights are gone, or have changed.
    """
    norms = checkpoint.get("left_out") or {}
    if not norms:
        return frozenset()
    flags, own = flags_in(checkpoint), model.state_dict()
    if not isinstance(norms, dict) or not norms.keys() <= own.keys():
        raise UserError(f"checkpoint {path} is of another model: it leaves out other weights")
    if start is None or not start.finetune:
        start = FinetuneConfig(
            **{f.name: flags[f.name] for f in fields(FinetuneConfig) if f.name in flags}
        )
    logger.info("%s leaves out %d weights", path, len(norms))
    load_start_weights(model, start, classes_in(checkpoint, path), context, named=False)
    for name, norm in norms.items():
        if not math.isclose(own[name].double().norm().item(), norm, rel_tol=1e-6):
            raise UserError(
                f"checkpoint {path} leaves out {name}, which is another one in the start weights "
                f"{start.finetune}: give those of its run by --finetune"
            )
    return frozenset(norms)


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
) -> frozenset[str]:
    """Load --finetune into `model`; UserError if more than the head doesn't fit.

    The head's rows are matched by `classes`, if these are `named`. Returns the names of the weights
    that the file has.
    """
    path = local_file(config.finetune, context)
    checkpoint = read_checkpoint(path, model)
    found = weights_in(checkpoint, path, config.model_key, config.model_prefix)
    # of a detector or segmentor, the backbone without the norms of its outputs
    own = {k: v for k, v in found.items() if re.match(r"backbone\.(?!norm\d)", k)}
    heads = heads_of(model)
    if hasattr(model, "base_model") and not any("base_model." in name for name in found):
        weights, may_lack = _of_base_model(found, model)
        done = "for base_model; everything else is new"
    else:
        weights, known = own_names(own or found, model), classes_in(checkpoint, path)
        # without names in the file, the order of its run is assumed
        known = known or numbered_as_saved(classes, flags_in(checkpoint))
        weights, done = _fit_head(weights, known, classes, named, heads)
        may_lack = _head_names(heads) | _load_left_out(model, checkpoint, path, context)
    if any(name.startswith("backbone.") for name in found):
        may_lack |= {"norm.weight", "norm.bias"}
        if not may_lack & weights.keys():
            done = "norm and head are new"
    weights, adapted = _fit_channels(weights, model)
    done = "; ".join(filter(None, (done, adapted)))
    load_exactly(model, weights, path, frozenset(may_lack))
    logger.info("start weights from %s%s", path, f"; {done}" if done else "")
    return frozenset(weights)


def _fit_channels(weights: Weights, model: nn.Module) -> tuple[Weights, str]:
    """Fit a first layer for RGB to images of other channels, as timm does; return what was done.

    For one channel its weights are summed, for others they are repeated and scaled.
    """
    name = f"{(getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')}.weight"
    own, given = model.state_dict().get(name), weights.get(name)
    if own is None or given is None or own.ndim != 4 or given.ndim != 4:
        return weights, ""
    channels = own.shape[1]
    if given.shape[1] != 3 or channels == 3:
        return weights, ""
    what = f"its first layer for RGB is adapted to {channels} channels"
    return weights | {name: adapt_input_conv(channels, given)}, what


def _of_base_model(found: Weights, model: Any) -> tuple[Weights, set[str]]:
    """Return the weights of a classifier under their names in a model around it, without its head.

    The second are the names that the model has in addition.
    """
    bare = pretrained.checkpoint_filter_fn(found, model.base_model)
    weights = own_names({f"base_model.{name}": value for name, value in bare.items()}, model)
    head = f"base_model.{heads_of(model.base_model)[0]}."
    kept = {name: value for name, value in weights.items() if not name.startswith(head)}
    own = model.state_dict()
    return kept, {n for n in own if n.startswith(head) or not n.startswith("base_model.")}


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


def _head_names(heads: tuple[str, ...]) -> set[str]:
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def check_head(weights: Weights, model: nn.Module, classes: list[str], path: str | Path) -> None:
    """Refuse weights for another number of classes, if their head tells it."""
    bias = weights.get(f"{heads_of(model)[0]}.bias")
    if bias is not None and len(bias) != len(classes):
        raise UserError(
            f"checkpoint {path} has {len(bias)} classes, the data {len(classes)}: give data with a "
            "folder for each (an empty one will do), or a checkpoint that names its classes"
        )
