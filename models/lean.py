"""Which layers are cheap to compute again (ops/recompute.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .layers import PointwiseConv, ScaledLayerNorm2d, layer_norm_2d
from .ops.pointwise import pointwise
from .ops.recompute import is_active, named


def cheap(layer: nn.Module, x: Tensor, *others: Any, is_operand: bool = False) -> Tensor:
    """layer(x, *others), named as cheap where the layer is of a known kind and has no hooks.

    Args:
        layer: A norm, GELU, or pointwise convolution; of others the results are kept.
        x: Its input.
        others: What else it takes.
        is_operand: Whether the result goes into matrix products alone.
    """
    y = layer(x, *others)
    if isinstance(x, torch.fx.Proxy) or not is_active() or has_hooks(layer):
        return y
    function, *inputs = _functional(layer, x, *others)
    return named(y, function, *inputs, is_operand=is_operand) if function else y


def _functional(layer: nn.Module, x: Tensor, *others: Any) -> tuple[Any, ...]:
    """A function without state and its inputs that give layer(x, *others); None if unknown."""
    if type(layer) in (LayerNorm2d, ScaledLayerNorm2d):
        return layer_norm_2d, x, layer.weight, layer.bias, layer.eps, *others
    if type(layer) is nn.GELU:
        return _gelu, x, layer.approximate
    if type(layer) is PointwiseConv and not others:
        return pointwise, x, layer.weight, layer.bias
    return (None,)


def has_hooks(*layers: nn.Module) -> bool:
    """Whether someone has hooks on these: to see, or to change, what goes in or comes out."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)
