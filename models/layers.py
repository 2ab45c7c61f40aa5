"""Layers whose output can be scaled by way of their weights, which are the smaller tensors.

Shapes: (B, C, H, W) in, (B, N, H, W) out.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .ops.depthwise import depthwise
from .ops.pointwise import pointwise
from .ops.recompute import cheap_product


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, computed by `pointwise`."""

    def __init__(self, in_channels: int, out_channels: int, device=None, dtype=None) -> None:
        super().__init__(in_channels, out_channels, 1, device=device, dtype=dtype)
        self.gelu = False

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`scale` (N) multiplies the output."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if scale is not None:
            weight = cheap_product(weight, scale[:, None, None, None])
            bias = None if bias is None else bias * scale
        return pointwise(x, weight, bias, self.gelu)


class PointwiseLinear(nn.Linear):
    """nn.Linear over the channels of a map, computed by `pointwise`."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.gelu = False

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`scale` (N) multiplies the output."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if scale is not None:
            weight = cheap_product(weight, scale[:, None])
            bias = None if bias is None else bias * scale
        return pointwise(x, weight, bias, self.gelu)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that keeps height and width.

    Raises:
        ValueError: the kernel is even.
    """

    def __init__(
        self, channels: int, kernel_size: int = 7, bias: bool = True, device=None, dtype=None
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"the kernel of a depthwise convolution is odd, not {kernel_size}")
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.use_triton = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` multiplies the output."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if scale != 1.0:
            weight = weight * scale
            bias = None if bias is None else bias * scale
        if not torch.jit.is_scripting() and self.use_triton:
            return _depthwise_by_triton(x, weight, bias)
        return depthwise(x, weight, bias)


@torch.jit.ignore
def _depthwise_by_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from .ops.kernels import depthwise_conv  # only now, for it imports Triton

    return depthwise_conv(x, weight, bias)


class ScaledLayerNorm2d(LayerNorm2d):
    """timm's layer norm over the channels of a map."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` multiplies the output."""
        return layer_norm_2d(x, self.weight, self.bias, self.eps, scale)


def layer_norm_2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float = 1.0
) -> Tensor:
    """The layer norm over the channels of a map, times `scale`."""
    if scale != 1.0:
        assert weight is not None
        assert bias is not None
        weight, bias = weight * scale, bias * scale
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)


@torch.no_grad()
def fold_norm(norm: nn.LayerNorm, layer: PointwiseConv | PointwiseLinear) -> None:
    """Moves the weight and bias of a norm, if it has them, into the layer behind it."""
    if type(norm) is not LayerNorm2d or norm.weight is None:
        return
    matrix = layer.weight.flatten(1)
    layer.bias.add_(matrix @ norm.bias)  # type: ignore[union-attr]
    matrix.mul_(norm.weight)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)


@torch.no_grad()
def fold_scale(layer: nn.Module, scale: Tensor) -> None:
    """Multiplies the output of a layer by `scale`, () or (N), by way of its parameters."""
    for parameter in layer.parameters(recurse=False):
        parameter.mul_(scale.reshape(-1, *[1] * (parameter.ndim - 1)))
