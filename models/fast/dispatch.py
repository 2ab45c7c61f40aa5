"""When the operators for CPUs apply."""

from typing import Any

import torch
from torch import Tensor, nn


def eager_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Return whether these are plain CPU tensors, with oneDNN and in eager mode.

    False under compilers, tracers, torch.func and forward-mode differentiation.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor  # no proxy or subclass
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.jit.is_tracing()
    )


def wants_gradient(*inputs: Any) -> bool:
    """Return whether autograd records operations on these tensors (or None)."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives the operands of matrix products; None if it is off."""
    device = x.device.type
    # torch 2.11 cannot trace is_autocast_available
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not has_autocast or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
