"""gnConv in a YOLO: HorBlock and C3HB, in a model definition in Ultralytics' format.

python -m examples.yolo

With Ultralytics itself (not needed here; tested with 8.4.190): copy its yolov8.yaml, replace C2f by
C3HB, call `register()`, then YOLO("my_model.yaml").
"""

import sys
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from models import Block

# input layer (-1: the previous one), repeats, module, arguments: first the output channels
DEFINITION = """
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C3HB, [32]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 2, C3HB, [64]]         # 4: stride 8
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, C3HB, [128]]        # 6: stride 16
head:
  - [-1, 1, nn.Upsample, [null, 2, nearest]]
  - [[-1, 4], 1, Concat, []]
  - [-1, 1, C3HB, [64]]         # 9: stride 8
"""


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        conv = nn.Conv2d(c1, c2, k, s, padding=k // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c2), nn.SiLU())


class HorBlock(nn.Module):
    """A HorNet block under its name in YOLOs: (B, c1, H, W) -> (B, c1, H, W).

    c1 is a multiple of 2^(order - 1); c2, if given, equals c1.
    """

    def __init__(
        self, c1: int, c2: int | None = None, order: int = 3, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if c2 not in (None, c1):
            raise ValueError(f"a HorBlock keeps its {c1} channels: it cannot give {c2}")
        self.block = Block(c1, order=order, drop_path=drop_path, layer_scale_init_value=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class C3HB(nn.Module):
    """YOLOv5's C3 with HorBlocks: (B, c1, H, W) -> (B, c2, H, W); e * c2 is a multiple of 4.

    `shortcut` and `g` are arguments of C3 without effect here.
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.m = nn.Sequential(*(HorBlock(hidden) for _ in range(n)))
        self.cv3 = Conv(2 * hidden, c2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Concat(nn.Module):
    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, 1)


SIZED: dict[str, Any] = {"Conv": Conv, "HorBlock": HorBlock, "C3HB": C3HB}
"""Modules whose first arguments are their input and output channels."""


class Model(nn.Module):
    """The layers of a definition: images (B, 3, H, W) -> output of the last layer."""

    def __init__(self, definition: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.sources: list[list[int]] = []
        widths = [3]  # of the images, then of each layer's output
        for source, repeats, name, arguments in definition["backbone"] + definition["head"]:
            if repeats > 1 and name != "C3HB":
                raise ValueError(f"{name} cannot be repeated {repeats} times: list it repeatedly")
            sources = [i if i == -1 else i + 1 for i in (source if name == "Concat" else [source])]
            width = sum(widths[i] for i in sources)
            if name == "C3HB":
                arguments = [arguments[0], repeats, *arguments[1:]]
            if name in SIZED:
                layer = SIZED[name](width, *arguments)
                width = arguments[0]
            else:
                kind = Concat if name == "Concat" else getattr(nn, name.removeprefix("nn."))
                layer = kind(*arguments)
            self.layers.append(layer)
            self.sources.append(sources)
            widths.append(width)

    def forward(self, images: Tensor) -> Tensor:
        maps = [images]
        for layer, sources in zip(self.layers, self.sources, strict=True):
            maps.append(layer(*(maps[i] for i in sources)))
        return maps[-1]


def register() -> None:
    """Make C3HB available in Ultralytics' model definitions, with scaled widths and repeats.

    Ultralytics scales only a fixed set of modules, so C3HB replaces one of them, C3TR, in this
    process.
    """
    from ultralytics.nn import tasks

    tasks.HorBlock = HorBlock
    tasks.C3HB = tasks.C3TR = C3HB


def main() -> Tensor:
    model = Model(yaml.safe_load(DEFINITION)).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 96, 128))
    blocks = sum(isinstance(layer, HorBlock) for layer in model.modules())
    sys.stdout.write(f"{blocks} HorBlocks: features {tuple(features.shape)}\n")
    return features


if __name__ == "__main__":
    main()
