"""Less memory in training: cheap results are not saved but recomputed in the backward pass.

Autograd saves the operands of products. Some are results of cheap operations: norms, activations,
gates. Inside `lean_memory`, a recipe for computing them is saved instead. Matrix products run once,
except the narrow ones of the recursion. Gradients are identical to the last bit.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .dispatch import autocast_dtype


class _Recipe:
    """How to recompute a tensor, and the tensor itself while it is needed."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any], result: Tensor) -> None:
        self.function, self.inputs, self.dtype = function, inputs, result.dtype
        self.versions = _versions(inputs)
        # a view keeps its base alive, not other views
        self.original = weakref.ref(result if result._base is None else result._base)
        dtype = autocast_dtype(result)
        self.autocast: Any = torch.autocast(result.device.type, dtype) if dtype else nullcontext()
        self.uses_left = 0
        self.result: Tensor | None = None

    def make(self) -> Tensor:
        self.uses_left -= 1
        result = self.result
        if result is None:
            if self.versions != _versions(self.inputs):
                raise RuntimeError(
                    "a tensor needed for the backward pass of memory='lean' has been modified by "
                    "an inplace operation"
                )
            inputs = [_unpack(packed) for packed in self.inputs]
            with torch.no_grad(), self.autocast:
                result = self.function(*inputs).to(self.dtype)
        self.result = result if self.uses_left > 0 else None
        return result


def _versions(packed: list[Any]) -> list[int]:
    return [x._version for x in packed if isinstance(x, Tensor)]


class _Recipes:
    """The recipes of a block, by the address of their results."""

    def __init__(self) -> None:
        self.known: dict[int, _Recipe] = {}

    def add(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        storage = result.untyped_storage()
        if storage.nbytes() != result.numel() * result.element_size():
            return  # part of another tensor
        packed = [self.pack(x.detach()) if isinstance(x, Tensor) else x for x in inputs]
        self.known[storage.data_ptr()] = _Recipe(function, packed, result)

    def pack(self, tensor: Tensor) -> Any:
        recipe = self.known.get(tensor.untyped_storage().data_ptr())
        # if the original is gone, another tensor may have its address
        if recipe is None or recipe.original() is None or recipe.dtype != tensor.dtype:
            return tensor
        recipe.uses_left += 1
        return recipe, tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, tuple):
        return packed
    recipe, shape, stride, offset = packed
    return recipe.make().as_strided(shape, stride, offset)


_active: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)


@contextmanager
def lean_memory() -> Iterator[None]:
    """Save recipes instead of the results of `cheap` in the body."""
    recipes = _Recipes()
    token = _active.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, _unpack):
            yield
    finally:
        _active.reset(token)


def cheap(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return function(*inputs), which is recomputed in the backward pass inside `lean_memory`.

    The function has to be pure, with weights among its inputs and without random numbers.
    """
    result = function(*inputs)
    if torch.compiler.is_compiling():  # compilers decide themselves what to recompute
        return result
    recipes = _active.get()
    if recipes is not None:
        recipes.add(result, function, inputs)
    return result


def operand(x: Tensor) -> Tensor:
    """Cast x as autocast would for a matrix product, so that the copy is recomputed, not saved."""
    if torch.compiler.is_compiling() or _active.get() is None:
        return x
    dtype = autocast_dtype(x)
    return x if dtype in (None, x.dtype) else cheap(torch.Tensor.to, x, dtype)
