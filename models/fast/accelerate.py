"""accelerate(model): the same parameters, names and function, computed faster.

It changes the class of each layer whose exact type it knows, as torch's fully_shard does.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..gnconv import GlobalLocalFilter, GnConv
from ..hornet import Block
from . import layers
from .layers import Fast

Model = TypeVar("Model", bound=nn.Module)
MEMORY = ("normal", "lean")


def accelerate(model: Model, memory: str = "normal", triton: bool = False) -> Model:
    """Compute the HorNet blocks and gnConvs inside `model` faster, in place; `plain` undoes it.

    Layers of other types, and layers with hooks, stay as they are: register hooks before.
    For inference, fold first: accelerate(timm.utils.reparameterize_model(model)).

    Args:
        memory: 'normal', or 'lean' for about half the memory (LeanBlock, lean.py): norms, GELU and
            gates are recomputed in the backward pass. Any other value raises ValueError. 'lean' has
            no effect on compiled models, and undoes what gradient checkpointing saves.
        triton: Use this project's GPU kernels where Triton, the device and the shape allow it.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r}: choose one of {', '.join(MEMORY)}")
    block = layers.LeanBlock if memory == "lean" else layers.FastBlock
    for module in plain(model).modules():
        # of gnConvs, those on maps: volumes and sequences have no faster layers
        if isinstance(module, GnConv) and isinstance(module.proj_in, nn.Conv2d):
            _swap(layers.PointwiseConv, module.proj_in, module.proj_out)
            _swap(layers.NarrowConv, *module.pws)
            _swap(layers.DepthwiseConv, module.dwconv)
            _swap(layers.FastGnConv, module)
        elif isinstance(module, GlobalLocalFilter):
            _swap(layers.DepthwiseConv, module.dw)
            _swap(layers.Norm, module.pre_norm, module.post_norm)
            _swap(layers.FastFilter, module)
        elif isinstance(module, Block):
            _swap(layers.Norm, module.norm1, module.norm2)
            # a subclass may use the output of pwconv1
            fuses = type(module) is Block and _fits(layers.Done, module.act)
            if fuses and _fits(layers.GeluLinear, module.pwconv1):
                _swap(layers.GeluLinear, module.pwconv1)
                _swap(layers.Done, module.act)
            _swap(layers.PointwiseLinear, module.pwconv1, module.pwconv2)
            _swap(block, module)
    if triton:
        from .triton_kernels import use_kernels  # imports Triton

        use_kernels(model)
    return model


def plain(model: Model) -> Model:
    """Undo `accelerate`, in place, for TorchScript, torch.fx, exports or hooks."""
    for module in model.modules():
        # classes derived from ours stay, such as those of torch.nn.utils.parametrize
        if isinstance(module, Fast) and type(module).__module__.startswith(f"{__package__}."):
            module.__class__ = module.plain  # type: ignore[assignment]
    return model


def _swap(fast: type[Fast], *layers: nn.Module) -> None:
    """Change the class of the layers that `fast` fits."""
    for layer in layers:
        if _fits(fast, layer):
            layer.__class__ = fast  # type: ignore[assignment]


def _fits(fast: type[Fast], layer: nn.Module) -> bool:
    """Return whether this is exactly the plain layer of a fast one, without hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks,
             layer._backward_hooks, layer._backward_pre_hooks)  # fmt: skip
    is_known = type(layer) is fast.plain and not any(hooks)
    return is_known and (fast not in _OPTIONS or _OPTIONS[fast](layer))


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether this is a depthwise convolution that keeps height and width."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == tuple(side // 2 for side in conv.kernel_size)
        and all(side % 2 for side in conv.kernel_size)
        and conv.padding_mode == "zeros"
    )


_OPTIONS: dict[type[Fast], Callable[[Any], bool]] = {
    layers.PointwiseConv: _is_pointwise,
    layers.NarrowConv: _is_pointwise,
    layers.DepthwiseConv: _is_depthwise,
    layers.Done: lambda gelu: gelu.approximate == "none",
}
"""Which options of the plain layer a fast one takes; all if it is not listed."""
