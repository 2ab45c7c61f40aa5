"""Trains stacks of gnConvs with and without a norm, the factor s, and a layer scale: which get NaN?

python -m examples.stability
"""

import sys
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GnConv


class Residual(nn.Module):
    """x + gamma * gnConv(norm(x)) on maps (B, C, H, W)."""

    def __init__(self, channels: int, order: int, scale: float, norm: bool, gamma: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels) if norm else nn.Identity()
        self.gnconv = GnConv(channels, order=order, scale=scale)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), gamma))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.gnconv(self.norm(x))


def train(
    order: int, scale: float, norm: bool, gamma: float, dtype: torch.dtype, steps: int = 60
) -> float | int:
    """Train eight layers to classify discs and squares; return the last loss.

    If the loss is not finite, return the number of the step instead, an int.
    """
    torch.manual_seed(0)
    layers = [Residual(16, order, scale, norm, gamma) for _ in range(8)]
    model = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), *layers, nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(16, 2))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        labels = torch.randint(0, 2, (16,), generator=generator)
        images = torch.randn(16, 3, 32, 32, generator=generator)
        rows, columns = torch.meshgrid(torch.arange(32) - 16, torch.arange(32) - 16, indexing="ij")
        discs, squares = rows**2 + columns**2 < 100, rows.abs().maximum(columns.abs()) < 9
        images += 2 * torch.stack((discs, squares))[labels][:, None]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images).float(), labels)
        if not loss.isfinite():
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    ways = {
        "no norm, s = 1": (1.0, False, 1.0),
        "no norm, s = 1/3": (1 / 3, False, 1.0),
        "no norm, s = 1/3, layer scale 1e-2": (1 / 3, False, 1e-2),
        "norm, s = 1": (1.0, True, 1.0),
        "norm, s = 1/3": (1 / 3, True, 1.0),
        "norm, s = 1/3, layer scale 1e-2": (1 / 3, True, 1e-2),
    }
    orders, dtypes = (2, 3, 4, 5), (torch.float32, torch.bfloat16)
    for (name, way), dtype in product(ways.items(), dtypes):
        cells = []
        for order in orders:
            found = train(order, *way, dtype)
            cells.append(f"NaN at {found}" if isinstance(found, int) else f"{found:.3f}")
        sys.stdout.write(f"| {name} | {str(dtype)[6:]} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
