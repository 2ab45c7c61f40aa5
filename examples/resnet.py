"""torchvision's ResNet-50 with gnConvs in place of the 3x3 convolutions of stride 1.

python -m examples.resnet
"""

import sys

import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

from models import GnConv


def with_gnconv(model: nn.Module, order: int = 3) -> nn.Module:
    """Replace every dense 3x3 convolution of stride 1 in a ResNet's bottlenecks, in place.

    The gnConvs are randomly initialized and need training; all other weights are kept. Raises
    ValueError if there are no such convolutions, as in ResNet-18 and ResNeXt.
    """
    blocks = [block for block in model.modules() if isinstance(block, Bottleneck)
              and block.conv2.stride == block.conv2.dilation == (1, 1)
              and block.conv2.groups == 1]  # fmt: skip
    if not blocks:
        raise ValueError("no 3x3 convolution of stride 1 in a bottleneck: use ResNet-50 or deeper")
    for block in blocks:
        old = block.conv2
        block.conv2 = GnConv(old.in_channels, old.out_channels, order=order)  # type: ignore[assignment]
    return model


def main() -> nn.Module:
    model = with_gnconv(resnet50(num_classes=10)).eval()
    count = sum(isinstance(layer, GnConv) for layer in model.modules())
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 96, 96))
    sys.stdout.write(f"ResNet-50 with {count} gnConvs: logits {tuple(logits.shape)}\n")
    return model


if __name__ == "__main__":
    main()
