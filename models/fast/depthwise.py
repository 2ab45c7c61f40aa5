"""Depthwise convolution with faster gradients, on CPUs.

oneDNN has no depthwise kernel for the gradient of weights larger than 3x3: it pads each group to 16
channels. But this gradient is itself a depthwise convolution, of each image by its output gradient,
and so is the gradient of x, by the flipped weight. For these, oneDNN has fast kernels (benchmarks/
has the rates).

Shapes: x (B, C, H, W), best channels last; weight (C, 1, K, L), K and L odd; bias (C); result like
x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import autocast_dtype, eager_on_cpu, wants_gradient


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the depthwise convolution of x that keeps height and width."""
    if not _serves(x, weight):
        return _convolution(x, weight, bias)
    dtype = _common_type(x, weight)
    # the outer parts of a kernel larger than the map only see padding
    rows, columns = (
        max(0, k // 2 + 1 - n) for k, n in zip(weight.shape[2:], x.shape[2:], strict=True)
    )
    weight = weight[:, :, rows : weight.shape[2] - rows, columns : weight.shape[3] - columns]
    inputs = [t if t is None else t.to(dtype) for t in (x, weight, bias)]
    if wants_gradient(*inputs):
        return _Depthwise.apply(*inputs)
    return _convolution(*inputs)  # type: ignore[arg-type]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether to use the fast gradients; other CPUs and dtypes were not measured."""
    return (
        eager_on_cpu(x, weight)
        and x.numel() > 0
        and x.stride(1) == 1
        and _common_type(x, weight) in (torch.float32, torch.bfloat16)
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def _common_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype of a convolution of x by weight; None if PyTorch has to decide."""
    if torch.float64 in (x.dtype, weight.dtype):
        return None
    return autocast_dtype(x) or (x.dtype if x.dtype == weight.dtype else None)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolution(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = gradients[0].contiguous(memory_format=torch.channels_last)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _Depthwise.apply(g, weight.flip(2, 3), None) if wants_x else None,
            _weight_gradient(x, g, weight) if wants_weight else None,
            g.sum((0, 2, 3)) if wants_bias else None,
        )


def _weight_gradient(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernel = weight.shape[2:]
    padding = [k // 2 for k in kernel]
    if max(kernel) <= 3 and min(height, width) > 3:  # oneDNN's own is as fast
        options: Any = ([1, 1], padding, [1, 1], False, [0, 0], channels, [False, True, False])
        return torch.ops.aten.convolution_backward(g, x, weight, None, *options)[1]
    # images side by side as channels: (1, B * C, H, W), channels last
    x_all = x.permute(2, 3, 0, 1).reshape(1, height, width, -1).permute(0, 3, 1, 2)
    g_all = g.reshape(-1, 1, height, width)
    products = F.conv2d(x_all, g_all, padding=padding, groups=len(g_all))
    return products.reshape(batch, channels, *kernel).float().sum(0)[:, None].to(weight.dtype)
