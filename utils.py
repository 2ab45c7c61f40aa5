"""Seeds, counts, class names, versions."""

import math
import os
import platform
import random
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, and torch on all devices."""
    seed_host(seed)
    torch.manual_seed(seed)


def use_deterministic_algorithms() -> None:
    """Let torch choose deterministic algorithms; it warns of operations that have none.

    Call it before CUDA is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_host(seed: int) -> None:
    """Seed Python, NumPy, and torch on the CPU, in a tenth of the time."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def stream_seed(kind: str, *numbers: int) -> int:
    """Return a seed for a kind of random numbers, such as those of an image in an epoch."""
    named = int.from_bytes(kind.encode(), "big")
    return int(np.random.SeedSequence((named, *numbers)).generate_state(1)[0])


def numbered_classes(count: int) -> list[str]:
    """Return the class names of data sets that have none."""
    return [str(label) for label in range(count)]


def are_names(classes: list[str], data_set: str) -> bool:
    """Return whether classes have names: numbers are names if they are those of folders."""
    has_folders = data_set in ("IMNET", "image_folder", "digits", "tar", "multi_label")
    return has_folders or classes != numbered_classes(len(classes))


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs_by_module(
    model: nn.Module, height: int, width: int | None = None
) -> dict[str, tuple[float, float]]:
    """`gmacs_of` a classifier for one RGB image, by default a square."""
    device = next(model.parameters()).device
    return gmacs_of(model, torch.empty(1, 3, height, width or height, device=device))


def gmacs_of(model: nn.Module, *inputs: Any) -> dict[str, tuple[float, float]]:
    """Return the giga multiply-adds per module, in order of execution; '' is the whole model.

    The first number counts convolutions and matrix products, the second FFTs: N ceil(log2 N) for a
    real transform of N values. The meta device is enough.
    """
    transforms = {torch.ops.aten._fft_r2c: _flops_r2c, torch.ops.aten._fft_c2r: _flops_c2r}
    counter = FlopCounterMode(display=False, custom_mapping=transforms)
    with counter, torch.no_grad():
        model.eval()  # of mmdet's ResNets it returns nothing
        model(*inputs)
    counts = {}
    for name, operations in counter.get_flop_counts().items():
        spectral = sum(n for operation, n in operations.items() if "_fft" in str(operation))
        counts[name] = ((sum(operations.values()) - spectral) / 2 / 1e9, spectral / 2 / 1e9)
    own = f"{type(model).__name__}."  # the counter's names begin with the model's class
    inside = {name.removeprefix(own): n for name, n in counts.items() if name.startswith(own)}
    return inside | {"": counts["Global"]}


def activations_of(model: nn.Module, *inputs: Any) -> int:
    """Return the number of values that convolutions and matrix products give out, as timm counts.

    The meta device is enough.
    """
    operations = ("convolution", "mm", "addmm", "bmm", "baddbmm")
    counts = {getattr(torch.ops.aten, name): _values for name in operations}
    counter = FlopCounterMode(display=False, custom_mapping=counts)
    with counter, torch.no_grad():
        model.eval()  # of mmdet's ResNets it returns nothing
        model(*inputs)
    return sum(counter.get_flop_counts()["Global"].values())


def _values(*_, out_shape, **__) -> int:
    return math.prod(out_shape)


def _flops_r2c(shape, dim, *_, **__) -> int:
    return 2 * math.prod(shape) * math.ceil(math.log2(math.prod(shape[d] for d in dim)))


def _flops_c2r(_, dim, *__, out_shape, **___) -> int:
    return _flops_r2c(out_shape, dim)


def is_like(value: Any, example: Any) -> bool:
    """Return whether two values have the same type; all numbers count as one type."""
    numbers = isinstance(value, int | float) and isinstance(example, int | float)
    return numbers or isinstance(value, type(example))


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = {m.__name__: str(m.__version__) for m in (torch, torchvision, timm)}
    return {"python": platform.python_version(), **packages}
