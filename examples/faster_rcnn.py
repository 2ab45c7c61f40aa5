"""torchvision's Faster R-CNN with a HorNet as its backbone.

python -m examples.faster_rcnn
"""

import sys

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import models  # noqa: F401 - registers the HorNets with timm


class Backbone(nn.Module):
    """Images (B, 3, H, W) -> five maps of 256 channels at strides 4, 8, 16, 32, 64."""

    out_channels = 256

    def __init__(self, model: str, pretrained: bool = False) -> None:
        super().__init__()
        self.body = timm.create_model(model, features_only=True, pretrained=pretrained)
        widths = self.body.feature_info.channels()  # type: ignore[union-attr,operator]
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.body(images))})


def detector(
    model: str, num_classes: int, pretrained: bool = False, min_size: int = 800
) -> FasterRCNN:
    """Return a Faster R-CNN with a HorNet.

    num_classes includes the background; images are resized to a short side of min_size.
    """
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    backbone = Backbone(model, pretrained)
    return FasterRCNN(backbone, num_classes, rpn_anchor_generator=anchors, min_size=min_size)


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = detector("hornet_atto_gf", num_classes=3, min_size=128).train()
    target = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 128, 160)], [target])
    shown = ", ".join(f"{name} {value.item():.2f}" for name, value in losses.items())
    sys.stdout.write(f"losses: {shown}\n")
    return losses


if __name__ == "__main__":
    main()
