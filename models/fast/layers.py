"""Faster layers of a HorNet: subclasses of the plain ones with the same parameters and function.

Some can multiply their output by a `factor`, through their weights, which are the smaller tensors.
`cheap` marks results to recompute in the backward pass (lean.py).

Shapes: (B, C, H, W) in and out, best channels last in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..gnconv import GlobalLocalFilter, GnConv
from ..hornet import Block
from ..layers import ChannelLinear
from ..spectral import spectral_filter
from .depthwise import depthwise
from .dispatch import autocast_dtype
from .lean import cheap, lean_memory, operand
from .pointwise import pointwise

# torch 2.6 has no is_exporting; there, compiled models resize in each forward pass
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Fast:
    """Base class of all faster layers."""

    plain: type[nn.Module]
    """The class whose function it computes."""


class _Pointwise(Fast):
    weight: Any
    bias: Any

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:  # factor (N)
        weight, bias = self.weight, self.bias
        if factor is not None:
            column = factor.reshape(-1, *[1] * (weight.ndim - 1))
            weight = operand(cheap(torch.mul, weight, column))
            bias = None if bias is None else bias * factor
        return pointwise(operand(x), weight, bias)


class PointwiseConv(_Pointwise, nn.Conv2d):
    plain = nn.Conv2d


class PointwiseLinear(_Pointwise, ChannelLinear):
    plain = ChannelLinear


class NarrowConv(Fast, nn.Conv2d):
    """A 1x1 convolution of the recursion, narrow enough to be computed twice."""

    plain = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        return cheap(pointwise, operand(x), self.weight, self.bias)


class GeluLinear(Fast, ChannelLinear):
    """A ChannelLinear followed by a GELU, which becomes `Done`."""

    plain = ChannelLinear

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(operand(x), self.weight, self.bias, gelu=True)


class Done(Fast, nn.GELU):
    """A GELU that the previous layer has computed."""

    plain = nn.GELU

    def forward(self, x: Tensor) -> Tensor:
        return x


class DepthwiseConv(Fast, nn.Conv2d):
    """A depthwise convolution that keeps height and width, with faster gradients."""

    plain = nn.Conv2d

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        if factor == 1.0:
            return self.convolve(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias * factor
        return self.convolve(x, self.weight * factor, bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return depthwise(x, weight, bias)


class Norm(Fast, LayerNorm2d):
    """A norm whose result is `cheap`: with lean memory the next layer does not save it."""

    plain = LayerNorm2d

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return cheap(_layer_norm, x, self.weight, self.bias, self.eps, factor)


class FastFilter(Fast, GlobalLocalFilter):
    """Interleaves the halves along the last axis in memory, and resizes the filter if necessary."""

    plain = GlobalLocalFilter

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        local, spectral = self.pre_norm(x).chunk(2, dim=1)
        local = self.dw(local)
        spectral = self.filter(spectral).to(local.dtype)
        halves = [half.permute(0, 2, 3, 1) for half in (local, spectral)]
        mixed = torch.stack(halves, dim=-1).flatten(-2).permute(0, 3, 1, 2)
        return _times(self.post_norm, mixed, factor)

    def filter(self, x: Tensor) -> Tensor:
        # a comparison would fix the size of what is traced or exported
        is_recorded = torch.jit.is_tracing() or _is_exporting()
        resize = is_recorded or self.complex_weight.shape[1:3] != (x.shape[2], x.shape[3] // 2 + 1)
        return spectral_filter(x, self.complex_weight, self.impl, resize)


class FastGnConv(Fast, GnConv):
    """Multiplies `scale` (s) into the weights of dwconv; main.py trains this, not the plain one."""

    plain = GnConv

    def forward(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """`gamma` (C_out) multiplies the output, through the weights of proj_out."""
        return self.recursion(self.proj_in(x), gamma)

    def recursion(self, projected: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Output of proj_in -> output."""
        p, q = torch.split(projected, [self.dims[0], sum(self.dims)], dim=1)
        return self.gates(p, _times(self.dwconv, q, self.scale), gamma)

    def gates(self, p: Tensor, q_all: Tensor, gamma: Tensor | None) -> Tensor:
        """p_0, and s times the depthwise output of all q_k -> output."""
        q = torch.split(q_all, self.dims, dim=1)
        p = cheap(torch.mul, p, q[0])
        for k, pw in enumerate(self.pws):
            p = cheap(torch.mul, pw(p), q[k + 1])
        return self.proj_out(p) if gamma is None else self.proj_out(p, gamma)


class FastBlock(Fast, Block):
    """In training, multiplies the layer scale into weights where that saves activations."""

    plain = Block

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = _add(x, self.mix(x), self.gamma1)
            y = self.pwconv2(self.act(self.pwconv1(self.norm2(x))))
            return _add(x, y, self.gamma2)
        if not self.scales_weights(x):
            return super().forward(x)
        x = x + self.drop_path(self.gnconv(self.norm1(x), self.gamma1))
        y = self.act(self.pwconv1(self.norm2(x)))
        return x + self.drop_path(self.pwconv2(y, self.gamma2))

    def mix(self, x: Tensor) -> Tensor:
        return self.gnconv(self.norm1(x))

    def scales_weights(self, x: Tensor) -> bool:
        """Return whether to multiply the layer scale into weights.

        Not if there are fewer pixels than inputs of pwconv2: then its weight is larger than the
        activations. Not in float16, where an initial scale of 1e-6 times a weight is 0.
        """
        return (
            isinstance(self.gnconv, FastGnConv)
            and isinstance(self.gnconv.proj_out, PointwiseConv)
            and isinstance(self.pwconv2, PointwiseLinear)
            and x.shape[0] * x.shape[2] * x.shape[3] >= self.pwconv2.in_features
            and (autocast_dtype(x) or self.pwconv2.weight.dtype) != torch.float16
        )


class LeanBlock(FastBlock):
    """Inside `lean_memory`, results of `cheap` (norms, GELU, gates) are recomputed, not saved."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        with lean_memory():
            return super().forward(x)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, factor: float
) -> Tensor:
    if factor != 1.0 and weight is not None:
        bias = None if bias is None else bias * factor
        weight, factor = weight * factor, 1.0
    x = x.permute(0, 2, 3, 1)
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)
    return y if factor == 1.0 else y * factor


def _times(layer: Any, x: Tensor, factor: float) -> Tensor:
    """Return factor * layer(x), through the layer's weights if possible."""
    if isinstance(layer, (DepthwiseConv, Norm, FastFilter)):  # torch 2.9 traces no union of types
        return layer(x, factor)
    return layer(x) if factor == 1.0 else layer(x) * factor


def _add(x: Tensor, y: Tensor, gamma: Tensor | None) -> Tensor:
    return x + y if gamma is None else torch.addcmul(x, y, gamma[:, None, None])
