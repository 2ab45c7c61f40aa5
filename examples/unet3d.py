"""A 3D U-Net of gnConvs, as for medical volumes, trained to segment balls in noise.

python -m examples.unet3d
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GnConv


class Stage(nn.Module):
    """x + gnConv(norm(x)) on volumes (B, C, D, H, W); C is a multiple of 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        # 7 x 7 x 7 weights per channel take long; HorNet's scale of 1/3 keeps the gates small
        self.gnconv = GnConv(channels, order=3, kernel_size=5, scale=1 / 3, spatial_dims=3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gnconv(self.norm(x))


class UNet3d(nn.Module):
    """Volumes (B, 1, D, H, W) -> logits (B, num_classes, D, H, W); sides are multiples of 2."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, width, 3, padding=1)
        self.fine = Stage(width)
        self.down = nn.Conv3d(width, 2 * width, 2, stride=2)
        self.coarse = Stage(2 * width)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.merged = Stage(2 * width)
        self.head = nn.Conv3d(2 * width, num_classes, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        fine = self.fine(self.stem(volumes))
        coarse = self.coarse(self.down(fine))
        return self.head(self.merged(torch.cat((self.up(coarse), fine), 1)))


def balls(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return noisy volumes (N, 1, S, S, S) with a bright ball each, and the masks (N, S, S, S)."""
    centre = size * (0.3 + 0.4 * torch.rand(count, 3, 1, 1, 1))
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1, 1))
    axes = torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij")
    masks = sum((axis - centre[:, i]) ** 2 for i, axis in enumerate(axes)) < radius**2
    return (masks + 0.7 * torch.randn(count, size, size, size))[:, None], masks.long()


def main(steps: int = 40) -> float:
    """Train; return the Dice coefficient of the balls in new volumes."""
    torch.manual_seed(0)
    model = UNet3d(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        volumes, masks = balls(4)
        optimizer.zero_grad()
        F.cross_entropy(model(volumes), masks).backward()
        optimizer.step()
    volumes, masks = balls(32)
    with torch.no_grad():
        found = model.eval()(volumes).argmax(1)
    dice = float(2 * (found & masks).sum() / (found.sum() + masks.sum()))
    sys.stdout.write(f"Dice coefficient of the balls after {steps} steps: {dice:.2f}\n")
    return dice


if __name__ == "__main__":
    main()
