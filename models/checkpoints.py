"""Published and older weights -> the state dict of this code."""

from typing import Any

from torch import Tensor, nn

from .ops.global_filter import resize_filter

_WRAPPERS = ("model", "state_dict", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")


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
        name = _strip(key)
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


def _strip(key: str) -> str:
    """Drop what DistributedDataParallel and torch.compile put before the name, in any order."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key
