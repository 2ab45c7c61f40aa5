"""What decides between an operator's implementations: where it runs, in which type, for whom."""

from typing import Any

import torch
from torch import Tensor, nn


def eager_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain tensors of a CPU with oneDNN, computed here and now.

    False for whatever records or transforms: a compiler, a tracer, torch.func, forward mode.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor  # no proxy, and none of the subclasses with rules of their own
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.jit.is_tracing()
    )


def wants_gradient(*inputs: Any) -> bool:
    """Whether autograd records what is done with these tensors; None among them does not count."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of the operands of a product with x; None where it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
