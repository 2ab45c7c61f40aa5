"""Counts parameters and multiply-adds of a model, by stage.

python -m tools.flops hornet_tiny_gf --input-size 224
python -m tools.flops object_detection/configs/hornet/CONFIG.py --input-size 800 1280
"""

import sys
from argparse import ArgumentTypeError, Namespace

import timm
import torch
from torch import nn

from config.flags import ModelConfig
from dense import flops
from dense.configs import read_config
from dense.run import need_stack
from runtime.errors import Parser, UserError, program
from runtime.sizes import Size, as_size, sides, size_text
from training.build import build_model
from utils import count_parameters, gmacs_by_module

COLUMNS = "{:22} {:>18} {:>13} {:>9} {:>9}\n"


def parser() -> Parser:
    this = Parser("python -m tools.flops", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("model", help="name of a registered model, or a config of mmdet or mmseg")
    add("--input-size", type=_side_or_two, nargs="+", metavar="PIXELS",
        help="side, or height and width; by default the model's own")  # fmt: skip
    add("--num-classes", type=int, default=1000, help="classes of the head (1000)")
    return this


def _side_or_two(text: str) -> list[int]:
    try:
        return [int(side) for side in text.split("x")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: give pixels, as in 224 or 224x320") from None


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's children, and the elements of those that are lists."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found |= {f"{name}.{index}": part for index, part in enumerate(child)}
        else:
            found[name] = child
    return found


def table(model: nn.Module, input_size: Size) -> str:
    """Return a line per part in order of execution, with its output for one image, and the sum."""
    shapes: dict[str, str] = {}
    named = parts(model)
    for name, part in named.items():
        part.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: " x ".join(map(str, out.shape[1:]))})
        )
    gmacs = gmacs_by_module(model, *sides(input_size))
    text = COLUMNS.format("part", "output", "parameters", "GMACs", "of FFTs")
    for name, shape in shapes.items():
        counts = gmacs.get(name, (0.0, 0.0))
        if count_parameters(named[name]) or any(counts):
            text += _row(name, shape, named[name], *counts)
    return text + _row("all", f"{size_text(input_size)} pixels", model, *gmacs[""])


def _row(name: str, shape: str, part: nn.Module, products: float, transforms: float) -> str:
    total = f"{products + transforms:.4f}"
    return COLUMNS.format(name, shape, f"{count_parameters(part):,}", total, f"{transforms:.4f}")


@program(parser)
def main(arguments: Namespace) -> None:
    name, sizes = arguments.model, [s for some in arguments.input_size or [] for s in some]
    try:
        if name.endswith(".py"):
            need_stack()
            text = flops.table(read_config(name), (sizes[0], sizes[-1]) if sizes else None)
        else:
            with torch.device("meta"):
                model = build_model(ModelConfig(model=name), arguments.num_classes)
            cfg = timm.get_pretrained_cfg(name)
            text = table(model, as_size(sizes or (cfg.input_size[1:] if cfg else 224)))
    except (ValueError, RuntimeError, AssertionError) as error:
        size = " ".join(map(str, sizes))
        raise UserError(f"--input-size {size}: {name} fails: {error}") from None
    sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
