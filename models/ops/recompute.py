"""Less memory in training: what is cheap to compute again is not kept for the backward pass.

Autograd saves the operands of each product. Some of them are results of cheap operations: norms,
activations, gates. Inside `lean_memory` such a result is not saved but how to compute it, and the
backward pass does so when it wants it. Matrix products run once, but for the narrow ones of the
recursion. The gradient is the same to the last bit.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class _Recipe:
    """How to compute a tensor again, and that tensor while it is wanted."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: list[Any],
        result: Tensor,
    ) -> None:
        self.function, self.inputs, self.dtype = function, inputs, result.dtype
        self.original = weakref.ref(result)
        self.device = result.device.type
        self.autocast = torch.is_autocast_enabled(self.device)
        self.autocast_dtype = torch.get_autocast_dtype(self.device)
        self.wanted = 0
        self.result: Tensor | None = None

    def make(self) -> Tensor:
        self.wanted -= 1
        result = self.result
        if result is None:
            inputs = [_unpack(packed) for packed in self.inputs]
            with torch.no_grad(), torch.autocast(
                self.device, self.autocast_dtype, enabled=self.autocast
            ):  # fmt: skip
                result = self.function(*inputs).to(self.dtype)
        self.result = result if self.wanted > 0 else None
        return result


class _Recipes:
    """The recipes of a block, by the memory that their results have for now."""

    def __init__(self) -> None:
        self.known: dict[int, _Recipe] = {}

    def add(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        storage = result.untyped_storage()
        if storage.nbytes() == result.numel() * result.element_size():  # no part of another tensor
            packed = [
                self.pack(value.detach()) if isinstance(value, Tensor) else value
                for value in inputs
            ]
            self.known[storage.data_ptr()] = _Recipe(function, packed, result)

    def pack(self, tensor: Tensor) -> Any:
        recipe = self.known.get(tensor.untyped_storage().data_ptr())
        # where the original is gone, its memory may have become another tensor's
        if recipe is None or recipe.original() is None or recipe.dtype != tensor.dtype:
            return tensor
        recipe.wanted += 1
        return recipe, tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, tuple):
        return packed
    recipe, shape, stride, offset = packed
    return recipe.make().as_strided(shape, stride, offset)


_active: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)


@contextmanager
def lean_memory() -> Iterator[None]:
    """Forward passes in here save how to compute what `cheap_product` and `make_cheap` name."""
    recipes = _Recipes()
    token = _active.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, _unpack):
            yield
    finally:
        _active.reset(token)


def cheap_product(x: Tensor, y: Tensor) -> Tensor:
    """x * y, named as cheap, for matrix products alone."""
    if torch.jit.is_scripting():
        return x * y
    return _named(x * y, torch.mul, (x, y), is_operand=True)


def make_cheap(module: nn.Module, is_operand: bool) -> Any:
    """Names a module's outputs as cheap; returns the handle to undo that.

    Args:
        module: What is cheap to compute.
        is_operand: Whether its output goes into matrix products alone, whose type it may have.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return _named(output, module.forward, inputs, is_operand)

    return module.register_forward_hook(hook)


@torch.jit.ignore
def _named(
    result: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...], is_operand: bool
) -> Tensor:
    recipes = _active.get()
    if recipes is None:
        return result
    device = result.device.type
    if is_operand and torch.is_autocast_enabled(device):
        # what autocast would do now, unseen: then the copy would be saved
        result = result.to(torch.get_autocast_dtype(device))
    recipes.add(result, function, inputs)
    return result
