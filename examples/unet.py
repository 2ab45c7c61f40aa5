"""A U-Net of gnConvs with different input and output widths, trained to segment discs on noise.

python -m examples.unet
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GnConv


class Stage(nn.Sequential):
    """Norm, gnConv, GELU: (B, C_in, H, W) -> (B, C_out, H, W); C_out is a multiple of 4."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        norm = nn.GroupNorm(1, in_channels)
        super().__init__(norm, GnConv(in_channels, out_channels, order=3), nn.GELU())


class UNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes, H, W); H and W are multiples of 4."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = Stage(width, width)
        self.down2 = Stage(width, 2 * width)
        self.bottom = Stage(2 * width, 4 * width)
        self.up2 = Stage(4 * width + 2 * width, 2 * width)
        self.up1 = Stage(2 * width + width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down1(self.stem(images))
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        x = self.up2(torch.cat((F.interpolate(coarse, scale_factor=2.0), middle), 1))
        x = self.up1(torch.cat((F.interpolate(x, scale_factor=2.0), fine), 1))
        return self.head(x)


def discs(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return noisy images (N, 3, S, S) with a bright disc each, and the masks (N, S, S)."""
    centre = size * (0.3 + 0.4 * torch.rand(count, 2, 1, 1))
    radius = size * (0.1 + 0.15 * torch.rand(count, 1, 1))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < radius**2
    return masks[:, None] + 0.7 * torch.randn(count, 3, size, size), masks.long()


def main(steps: int = 60) -> float:
    """Train; return the IoU of the discs in new images."""
    torch.manual_seed(0)
    model = UNet(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        images, masks = discs(16)
        optimizer.zero_grad()
        F.cross_entropy(model(images), masks).backward()
        optimizer.step()
    images, masks = discs(64)
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    iou = float((found & masks).sum() / (found | masks).sum())
    sys.stdout.write(f"IoU of the discs after {steps} steps: {iou:.2f}\n")
    return iou


if __name__ == "__main__":
    main()
