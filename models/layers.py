"""1x1 and depthwise layers, and folding scales and norms into them for inference."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class ChannelLinear(nn.Linear):
    """A 1x1 convolution whose weight has the shape of a linear layer's, as in released files."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""Convolutions by the number of spatial dimensions."""


def depthwise_conv(
    channels: int,
    kernel_size: int = 7,
    bias: bool = True,
    spatial_dims: int = 2,
    device=None,
    dtype=None,
) -> Any:
    """Return a depthwise convolution that keeps the size of maps; ValueError for even kernels."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"the kernel of a depthwise convolution is odd, not {kernel_size}")
    return CONVOLUTIONS[spatial_dims](
        channels, channels, kernel_size, padding=kernel_size // 2, groups=channels,
        bias=bias, device=device, dtype=dtype,
    )  # fmt: skip


def defined_by(layer: nn.Module) -> type:
    """Return the class that defines what a layer computes: the plain one if it is accelerated."""
    return getattr(layer, "plain", type(layer))


@torch.no_grad()
def fold_scale(scale: Tensor | None, layer: nn.Module) -> bool:
    """Multiply a layer's parameters so that its output is scaled by `scale`, () or (channels).

    Returns False, and does nothing, without a scale or for a layer of another type.
    """
    if scale is None or defined_by(layer) not in (nn.Conv2d, ChannelLinear, LayerNorm2d):
        return False
    for parameter in layer.parameters(recurse=False):
        parameter.mul_(scale.reshape(-1, *[1] * (parameter.ndim - 1)))
    return True


@torch.no_grad()
def fold_norm(norm: Any, layer: Any) -> None:
    """Move the weight and bias of a LayerNorm2d into the 1x1 layer that follows it."""
    is_pointwise = defined_by(layer) is ChannelLinear or (
        defined_by(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
    )
    is_affine = defined_by(norm) is LayerNorm2d and norm.weight is not None
    if not (is_affine and is_pointwise) or layer.bias is None:
        return
    matrix = layer.weight.flatten(1)
    layer.bias.add_(matrix @ norm.bias)
    matrix.mul_(norm.weight)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
