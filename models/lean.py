"""Which layers are cheap to compute again (ops/recompute.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .layers import PointwiseConv, ScaledLayerNorm2d
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
    if type(layer) is LayerNorm2d and not others:
        function, inputs = _norm, (x, layer.weight, layer.bias, layer.eps, 1.0)
    elif type(layer) is ScaledLayerNorm2d:
        function, inputs = _norm, (x, layer.weight, layer.bias, layer.eps, *(others or (1.0,)))
    elif type(layer) is nn.GELU:
        return named(y, _gelu, x, layer.approximate, is_operand=is_operand)
    elif type(layer) is PointwiseConv and not others:
        return named(y, pointwise, x, layer.weight, layer.bias, is_operand=is_operand)
    else:
        return y
    return named(y, function, *inputs, is_operand=is_operand)


def has_hooks(*layers: nn.Module) -> bool:
    """Whether someone has hooks on these: to see, or to change, what goes in or comes out."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float
) -> Tensor:
    if scale != 1.0:
        assert weight is not None
        assert bias is not None
        weight, bias = weight * scale, bias * scale
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)
