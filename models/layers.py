"""The 1x1 and depthwise layers of a HorNet, and how scales and norms fold into them."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class ChannelLinear(nn.Linear):
    """A 1x1 convolution whose weight is stored as a linear layer's, as in the released files."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


def depthwise_conv(
    channels: int, kernel_size: int = 7, bias: bool = True, device=None, dtype=None
) -> nn.Conv2d:
    """A depthwise convolution that keeps height and width; ValueError for an even kernel."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"the kernel of a depthwise convolution is odd, not {kernel_size}")
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels,
                     bias=bias, device=device, dtype=dtype)  # fmt: skip


def defined_by(layer: nn.Module) -> type:
    """The class that says what a layer computes: its own, of an accelerated one the plain class."""
    return getattr(layer, "plain", type(layer))


@torch.no_grad()
def fold_scale(scale: Tensor | None, layer: nn.Module) -> bool:
    """Multiply the output of a layer by `scale`, () or (channels), by way of its parameters.

    Returns False, with nothing done, if there is no scale or the layer is of an unknown type.
    """
    if scale is None or defined_by(layer) not in (nn.Conv2d, ChannelLinear, LayerNorm2d):
        return False
    for parameter in layer.parameters(recurse=False):
        parameter.mul_(scale.reshape(-1, *[1] * (parameter.ndim - 1)))
    return True


@torch.no_grad()
def fold_norm(norm: Any, layer: Any) -> None:
    """Move the weight and bias of a LayerNorm2d, if it has them, into the 1x1 layer behind it."""
    is_pointwise = defined_by(layer) is ChannelLinear or (
        defined_by(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
    )
    if defined_by(norm) is not LayerNorm2d or norm.weight is None or not is_pointwise:
        return
    if layer.bias is None:
        return
    matrix = layer.weight.flatten(1)
    layer.bias.add_(matrix @ norm.bias)
    matrix.mul_(norm.weight)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
