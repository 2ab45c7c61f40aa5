"""Less memory in training: what is cheap to compute again is not kept for the backward pass.

Autograd saves the operands of each product. Some of them are results of cheap operations: norms,
activations, gates. Inside `lean_memory` such a result is not saved but how to compute it, and the
backward pass does so when it wants it. Matrix products run once, but for the narrow ones of the
recursion. The gradient is the same to the last bit.
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
    """How to compute a tensor again, and that tensor while it is wanted."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any], result: Tensor) -> None:
        self.function, self.inputs, self.dtype = function, inputs, result.dtype
        self.versions = [_version(packed) for packed in inputs]
        self.original = weakref.ref(result)
        self.autocast_dtype = autocast_dtype(result)
        self.device = result.device.type
        self.wanted = 0
        self.result: Tensor | None = None

    def make(self) -> Tensor:
        self.wanted -= 1
        result = self.result
        if result is None:
            if self.versions != [_version(packed) for packed in self.inputs]:
                raise RuntimeError(
                    "a tensor that lean memory needs for the backward pass has been modified by an "
                    "inplace operation"
                )
            inputs = [_unpack(packed) for packed in self.inputs]
            autocast = (
                nullcontext()
                if self.autocast_dtype is None
                else torch.autocast(self.device, self.autocast_dtype)
            )
            with torch.no_grad(), autocast:
                result = self.function(*inputs).to(self.dtype)
        self.result = result if self.wanted > 0 else None
        return result


def _version(packed: Any) -> int | None:
    return packed._version if isinstance(packed, Tensor) else None


class _Recipes:
    """The recipes of a block, by the memory that their results have for now."""

    def __init__(self) -> None:
        self.known: dict[int, _Recipe] = {}

    def add(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        storage = result.untyped_storage()
        if storage.nbytes() != result.numel() * result.element_size():
            return  # a part of another tensor
        packed = [self.pack(x.detach()) if isinstance(x, Tensor) else x for x in inputs]
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
    """Forward passes in here save how to compute what `named` and `cheap_product` name."""
    recipes = _Recipes()
    token = _active.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, _unpack):
            yield
    finally:
        _active.reset(token)


def is_active() -> bool:
    """Whether this is inside `lean_memory`."""
    return not torch.compiler.is_compiling() and _active.get() is not None


def named(
    result: Tensor, function: Callable[..., Tensor], *inputs: Any, is_operand: bool
) -> Tensor:
    """The result of function(*inputs), named as cheap to compute again; inside `lean_memory`.

    Args:
        result: What the function gave, or would give.
        function: Without state: it draws no random numbers, and its weights are among the inputs.
        inputs: Tensors, and whatever else it takes.
        is_operand: Whether the result goes into matrix products alone, whose type it may have.
    """
    recipes = _active.get()
    assert recipes is not None
    dtype = autocast_dtype(result)
    if is_operand and dtype is not None:
        # what autocast would do now, unseen: then the copy would be saved
        result = result.to(dtype)
    recipes.add(result, function, inputs)
    return result


def cheap_product(x: Tensor, y: Tensor) -> Tensor:
    """x * y, named as cheap, for matrix products alone."""
    product = x * y
    # nested, or TorchScript would look inside
    if not torch.jit.is_scripting():  # noqa: SIM102
        if is_active():
            product = named(product, torch.mul, x, y, is_operand=True)
    return product
