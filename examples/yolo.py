"""gnConv in a YOLO: HorBlock and C3HB, in a model definition of Ultralytics' form.

python -m examples.yolo

With Ultralytics itself (not needed here; tried with 8.4.190): copy its yolov8.yaml, write C3HB
instead of C2f, call `register()`, then YOLO("my_model.yaml").
"""

import sys
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from models import Block

# from (-1: the layer before), repeats, module, arguments: output channels first
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
        super().__init__(
            nn.Conv2d(c1, c2, k, s, padding=k // 2, bias=False), nn.BatchNorm2d(c2), nn.SiLU()
        )


class HorBlock(nn.Module):
    """A HorNet block (gnConv, then MLP, each with its norm and shortcut) as the YOLO community
    names it: (B, c1, H, W) -> (B, c1, H, W); c2, if given, is c1; it is a multiple of
    2^(order - 1)."""

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
    """YOLOv5's C3 with HorBlocks: (B, c1, H, W) -> (B, c2, H, W); e * c2 a multiple of 4."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
    ) -> None:
        super().__init__()  # shortcut and g are C3's, and mean nothing here
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.m = nn.Sequential(*(HorBlock(hidden) for _ in range(n)))
        self.cv3 = Conv(2 * hidden, c2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Concat(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, 1)


LAYERS_OF_WIDTHS: dict[str, Any] = {"Conv": Conv, "HorBlock": HorBlock, "C3HB": C3HB}
"""Those that are told the channels of their input and output."""


class Model(nn.Module):
    """The layers of a definition; images (B, 3, H, W) -> the last layer's map."""

    def __init__(self, definition: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.sources: list[list[int]] = []
        widths = [3]  # of the images, then of each layer's output
        for source, repeats, name, arguments in definition["backbone"] + definition["head"]:
            if repeats > 1 and name != "C3HB":
                raise ValueError(f"{name} cannot be repeated {repeats} times: write it as often")
            sources = [i if i == -1 else i + 1 for i in (source if name == "Concat" else [source])]
            width = sum(widths[i] for i in sources)
            if name in LAYERS_OF_WIDTHS:
                more = [repeats] if name == "C3HB" else []
                layer = LAYERS_OF_WIDTHS[name](width, arguments[0], *more, *arguments[1:])
                width = arguments[0]
            elif name == "Concat":
                layer = Concat()
            else:
                layer = getattr(nn, name.removeprefix("nn."))(*arguments)
            self.layers.append(layer)
            self.sources.append(sources)
            widths.append(width)

    def forward(self, images: Tensor) -> Tensor:
        maps = [images]
        for layer, sources in zip(self.layers, self.sources, strict=True):
            inputs = [maps[i] for i in sources]
            maps.append(layer(inputs if isinstance(layer, Concat) else inputs[0]))
        return maps[-1]


def register() -> None:
    """Makes C3HB known to Ultralytics' models, with its scaling of widths and repeats.

    These are kept for a fixed set of modules, so C3HB takes the place of one of them, C3TR, for
    as long as the process lives.
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
