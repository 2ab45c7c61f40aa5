"""accelerate(model): the same parameters, names and function, computed faster.

It changes the class of each layer whose exact type it knows, as torch's fully_shard does.
"""

from typing import TypeVar

from torch import nn

from ..gnconv import GlobalLocalFilter, GnConv
from ..hornet import Block
from . import layers
from .layers import Fast

Model = TypeVar("Model", bound=nn.Module)
MEMORY = ("normal", "lean")


def accelerate(model: Model, memory: str = "normal", triton: bool = False) -> Model:
    """Compute the HorNet blocks and gnConvs inside `model` faster, in place; `plain` undoes it.

    Layers of other types, and layers with forward hooks, stay as they are: register hooks before.
    For inference, fold first: accelerate(timm.utils.reparameterize_model(model)).

    Args:
        model: Any model.
        memory: 'normal', or 'lean' for about half the memory: norms, GELU and gates are recomputed
            in the backward pass. It has no effect on compiled models.
        triton: Use this project's GPU kernels where Triton, the device and the shape allow it.

    Returns:
        The model.

    Raises:
        ValueError: memory is unknown.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r}: choose one of {', '.join(MEMORY)}")
    for module in plain(model).modules():
        if isinstance(module, GnConv):
            _accelerate_gnconv(module)
        elif isinstance(module, GlobalLocalFilter):
            _accelerate_filter(module)
        elif isinstance(module, Block):
            _accelerate_block(module, layers.LeanBlock if memory == "lean" else layers.FastBlock)
    if triton:
        from .triton_kernels import use_kernels  # imports Triton

        use_kernels(model)
    return model


def plain(model: Model) -> Model:
    """Undo `accelerate`, in place, for TorchScript, torch.fx, exports or hooks."""
    for module in model.modules():
        if isinstance(module, Fast):
            module.__class__ = module.plain  # type: ignore[assignment]
    return model


def _accelerate_gnconv(layer: GnConv) -> None:
    for conv in (layer.proj_in, layer.proj_out):
        _swap(conv, layers.PointwiseConv, _is_pointwise(conv))
    for pw in layer.pws:
        _swap(pw, layers.NarrowConv, _is_pointwise(pw))
    _swap(layer.dwconv, layers.DepthwiseConv, _is_depthwise(layer.dwconv))
    _swap(layer, layers.FastGnConv)


def _accelerate_filter(layer: GlobalLocalFilter) -> None:
    _swap(layer.dw, layers.DepthwiseConv, _is_depthwise(layer.dw))
    _swap(layer.pre_norm, layers.Norm)
    _swap(layer.post_norm, layers.Norm)
    _swap(layer, layers.FastFilter)


def _accelerate_block(block: Block, fast: type[layers.FastBlock]) -> None:
    _swap(block.norm1, layers.Norm)
    _swap(block.norm2, layers.Norm)
    _swap(block.pwconv2, layers.PointwiseLinear)
    # a subclass may use the output of pwconv1
    fuses = type(block) is Block and getattr(block.act, "approximate", "") == "none"
    if fuses and _is_known(block.act, nn.GELU) and _swap(block.pwconv1, layers.GeluLinear):
        _swap(block.act, layers.Done)
    else:
        _swap(block.pwconv1, layers.PointwiseLinear)
    _swap(block, fast)


def _swap(layer: nn.Module, fast: type[Fast], fits: bool = True) -> bool:
    """Change the class of a layer if it is exactly the plain one; return whether it was."""
    if not (fits and _is_known(layer, fast.plain)):
        return False
    layer.__class__ = fast  # type: ignore[assignment]
    return True


def _is_known(layer: nn.Module, plain: type[nn.Module]) -> bool:
    return type(layer) is plain and not (layer._forward_hooks or layer._forward_pre_hooks)


def _is_pointwise(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
    )


def _is_depthwise(layer: nn.Module) -> bool:
    """Return whether this is a depthwise convolution that keeps height and width."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.stride == layer.dilation == (1, 1)
        and layer.padding == tuple(side // 2 for side in layer.kernel_size)
        and all(side % 2 for side in layer.kernel_size)
        and layer.padding_mode == "zeros"
    )
