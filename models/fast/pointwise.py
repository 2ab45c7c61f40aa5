"""1x1 convolutions by oneDNN's matrix product, on CPUs in float32.

PyTorch would use MKL, which is slower on AMD CPUs (benchmarks/ has the rates of both).

Shapes: x (B, C, H, W), best channels last in memory; weight (N, C) or (N, C, 1, 1); bias (N);
result (B, N, H, W).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .dispatch import autocast_dtype, eager_on_cpu, wants_gradient
from .lean import cheap

ONEDNN_MATMUL: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's matrix product; None if torch is built without it."""


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return the 1x1 convolution of x, then GELU if asked for."""
    if type(weight) not in (Tensor, nn.Parameter, FakeTensor) and weight.ndim == 2:
        # quantised by torchao, which has this operator only
        y = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        return F.gelu(y) if gelu else y
    if not onednn_serves(x, weight):
        y = F.conv2d(x, weight.flatten(1)[:, :, None, None], bias)
        return cheap(F.gelu, y) if gelu else y
    x_bhwc, matrix = x.permute(0, 2, 3, 1), weight.flatten(1)
    rows = x_bhwc.flatten(0, 2)  # with more axes the result would be a view, not modifiable
    if wants_gradient(rows, matrix, bias):
        y = _OneDnnLinear.apply(rows, matrix, bias)
        y = cheap(F.gelu, y) if gelu else y
    else:
        y = _matmul(rows, matrix, bias, "gelu" if gelu else "none")
    return y.unflatten(0, x_bhwc.shape[:3]).permute(0, 3, 1, 2)


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether `pointwise` uses oneDNN's matrix product for these tensors."""
    return (
        eager_on_cpu(x, weight)
        and ONEDNN_MATMUL is not None
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and autocast_dtype(x) is None
    )


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, after: str = "none") -> Tensor:
    """Return x (rows, C) times weight (N, C) transposed, plus bias."""
    return ONEDNN_MATMUL(x, weight, bias, after, [], "none")


class _OneDnnLinear(torch.autograd.Function):
    """`_matmul` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (rows,) = gradients
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_weight = None
        # oneDNN is faster if the result has fewer rows than columns
        if wants_weight and weight.shape[0] <= weight.shape[1]:
            of_weight = _OneDnnLinear.apply(rows.t(), x.t(), None)
        elif wants_weight:
            of_weight = _OneDnnLinear.apply(x.t(), rows.t(), None).t()
        of_x = _OneDnnLinear.apply(rows, weight.t(), None) if wants_x else None
        return of_x, of_weight, rows.sum(0) if wants_bias else None


# another copy of this package in the process, such as torch.hub's, may have registered it
if ONEDNN_MATMUL is not None and ONEDNN_MATMUL not in flop_registry:
    register_flop_formula(ONEDNN_MATMUL)(lambda x, weight, *_, **__: 2 * x.numel() * weight[0])
