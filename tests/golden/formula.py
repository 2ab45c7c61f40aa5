"""Weights and inputs by formula: the same numbers on every machine, without storing any.

The recorded facts in this folder (outputs, training trajectories) were made with them.
"""

import zlib

import numpy as np
import torch
from torch import nn


def formula_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the state-dict entry `name`, float32 of the given shape."""
    seed = zlib.crc32(name.encode())
    v = np.random.RandomState(seed).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last.startswith("gamma"):
        v = 0.5 + 0.1 * v
    elif last == "complex_weight":
        v = 0.5 * v
    elif last in ("bias", "running_mean"):
        v = 0.1 * v
    elif len(shape) == 1:
        v = 1 + 0.1 * v
    else:
        v = v / np.sqrt(np.prod(shape[1:]))
    return v.astype(np.float32)


@torch.no_grad()
def fill_by_formula(module: nn.Module) -> nn.Module:
    """Fill every entry of the module's state dict in place, and return the module."""
    for name, entry in module.state_dict().items():
        if entry.is_floating_point():
            entry.copy_(torch.from_numpy(formula_weight(name, tuple(entry.shape))))
    return module


def formula_input(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Input of shape (batch, channels, height, width), float32."""
    v = np.random.RandomState(1000 * height + width).standard_normal(
        (batch, channels, height, width)
    )
    return torch.from_numpy(v.astype(np.float32))
