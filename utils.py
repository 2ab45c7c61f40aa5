"""Seeds, accuracy, counts and version facts."""

import platform
import random

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed of its own for every run, epoch and process; reproducible after a resume."""
    return int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])


def topk_correct(logits: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    """How many of `target` (N) are among the k largest of `logits` (N, classes); a 0-D tensor."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == target[:, None]).any(dim=1).sum()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmacs(model: nn.Module, input_size: int) -> float:
    """Giga multiply-adds of convolutions and matrix products for one image.

    On the meta device it takes neither memory nor time.
    """
    image = torch.empty(1, 3, input_size, input_size, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() / 2 / 1e9


def versions() -> dict[str, str]:
    """Versions a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
