"""Published and older weights -> the state dict of this code."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ops.global_filter import resize_filter

_WRAPPERS = ("model", "state_dict", "model_ema")
# of DistributedDataParallel, torch.compile, and the backbone of a detector or segmentor
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """State dict for `model` out of a checkpoint: unwrapped, unprefixed, filters resized.

    Args:
        checkpoint: A state dict, or a dict that holds one under 'model', 'state_dict' or
            'model_ema' (the first of these that is there).
        model: The model to load; global filters (C, h, w, 2) take the sizes of its own.
    """
    state_dict = _unwrap(checkpoint)
    expected = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        name = _strip(key, expected)
        if name.endswith("complex_weight") and name in expected:
            height, width = expected[name].shape[1:3]
            if value.shape[1:3] != (height, width):
                value = resize_filter(value.float(), height, width).contiguous().to(value.dtype)
        out[name] = value
    return out


def _unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), dict):
            return checkpoint[wrapper]
    return checkpoint


def _strip(key: str, expected: dict[str, Tensor]) -> str:
    """Drops known prefixes, in any order, that the model's own names do not have."""
    while key not in expected and key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


@cache
def imagenet1k_in_22k() -> list[int]:
    """For each class of ImageNet-1K its row in the head of the released ImageNet-22K models."""
    return json.loads((Path(__file__).parent / "imagenet1k_in_22k.json").read_text())


def fit_head(state_dict: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Fits the rows of the head to the model's classes; returns the state dict and what was done.

    The head of the ImageNet-22K models becomes one of ImageNet-1K where the model has 1000
    classes. Any other head of another class count is left out, for a new one to be learnt.
    """
    weight, expected = state_dict.get("head.weight"), model.state_dict().get("head.weight")
    if weight is None or expected is None or len(weight) == len(expected):
        return state_dict, ""
    heads = {"head.weight", "head.bias"}
    rows = imagenet1k_in_22k()
    if len(expected) == len(rows) and len(weight) > max(rows):
        index = torch.tensor(rows)
        taken = {name: state_dict[name][index] for name in heads & state_dict.keys()}
        return state_dict | taken, f"the head's {len(rows)} rows are taken out of {len(weight)}"
    rest = {name: value for name, value in state_dict.items() if name not in heads}
    return rest, f"the head starts anew: {len(weight)} classes in the file, {len(expected)} here"
