"""Seeds, accuracy, counts, names of classes, and versions."""

import math
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
    """Seeds Python, NumPy and torch on every device."""
    seed_host(seed)
    torch.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seeds what draws on the CPU, in a tenth of the time; enough for loading an image."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def stream_seed(kind: str, *numbers: int) -> int:
    """A seed for one of a kind, such as the image of a run, an epoch and an index."""
    named = int.from_bytes(kind.encode(), "big")
    return int(np.random.SeedSequence((named, *numbers)).generate_state(1)[0])


def topk_correct(logits: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    """How many of `target` (N) are among the k largest of `logits` (N, classes); a 0-D tensor."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == target[:, None]).any(dim=1).sum()


def numbered_classes(count: int) -> list[str]:
    """What classes are called where nothing names them: by their numbers."""
    return [str(label) for label in range(count)]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmacs(model: nn.Module, input_size: int) -> float:
    """Giga multiply-adds of convolutions, matrix products and FFTs for one image."""
    return sum(gmacs_by_module(model, input_size)[""])


def gmacs_by_module(model: nn.Module, input_size: int) -> dict[str, tuple[float, float]]:
    """`gmacs_of` a classifier for one image of input_size x input_size pixels."""
    device = next(model.parameters()).device
    return gmacs_of(model, torch.empty(1, 3, input_size, input_size, device=device))


def gmacs_of(model: nn.Module, *inputs: Any) -> dict[str, tuple[float, float]]:
    """Of each module (in the order they run; '' is the model): giga multiply-adds for `inputs`.

    First those of convolutions and matrix products, then those of FFTs, a real transform of N
    values counted as N ceil(log2 N). On the meta device it takes neither memory nor time.
    """
    transforms = {torch.ops.aten._fft_r2c: _flops_r2c, torch.ops.aten._fft_c2r: _flops_c2r}
    counter = FlopCounterMode(display=False, custom_mapping=transforms)
    with counter, torch.no_grad():
        model.eval()(*inputs)
    counts = {}
    for name, operations in counter.get_flop_counts().items():
        spectral = sum(n for operation, n in operations.items() if "_fft" in str(operation))
        rest = sum(operations.values()) - spectral
        counts[name] = (rest / 2 / 1e9, spectral / 2 / 1e9)
    # the counter's names begin with the model's class
    own = f"{type(model).__name__}."
    inside = {name.removeprefix(own): n for name, n in counts.items() if name.startswith(own)}
    return inside | {"": counts["Global"]}


def _flops_r2c(shape, dim, *_, **__) -> int:
    return 2 * math.prod(shape) * math.ceil(math.log2(math.prod(shape[d] for d in dim)))


def _flops_c2r(_, dim, *__, out_shape, **___) -> int:
    return _flops_r2c(out_shape, dim)


def is_like(value: Any, example: Any) -> bool:
    """Whether a value is of the type of another; all numbers are like each other."""
    numbers = isinstance(value, int | float) and isinstance(example, int | float)
    return numbers or isinstance(value, type(example))


def versions() -> dict[str, str]:
    """Versions a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
