"""Parameters and multiply-adds of a model, by stage.

python -m tools.flops hornet_tiny_gf --input-size 224
python -m tools.flops object_detection/configs/hornet/CONFIG.py --input-size 800 1280
"""

import argparse
import sys
from collections.abc import Callable

import timm
import torch
from torch import nn

from config import ModelConfig
from dense import flops
from dense.configs import read_config
from dense.run import need_stack
from runtime.errors import UserError, run_program
from training.build import build_model
from utils import count_parameters, gmacs_by_module


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.flops", description="Parameters and multiply-adds of a model, by stage."
    )
    this.add_argument("model", help="name of a registered model, or a config of mmdet or mmseg")
    this.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side, or of a config height and width; what the model is made for if absent",
    )
    this.add_argument("--num-classes", type=int, default=1000, help="classes of the head (1000)")
    return this


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The model's children, lists of them taken apart."""
    found = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found.update({f"{name}.{index}": part for index, part in enumerate(child)})
        else:
            found[name] = child
    return found


def table(model: nn.Module, input_size: int) -> str:
    """A line a part in the order they run, with its output for one image; the sum below."""
    shapes: dict[str, str] = {}
    named = parts(model)
    for name, part in named.items():
        part.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: " x ".join(map(str, out.shape[1:]))})
        )
    gmacs = gmacs_by_module(model, input_size)
    columns = "{:22} {:>18} {:>13} {:>9} {:>9}\n"
    text = columns.format("part", "output", "parameters", "GMACs", "of FFTs")
    for name, shape in shapes.items():
        count = count_parameters(named[name])
        products, transforms = gmacs.get(name, (0.0, 0.0))
        if count or products:
            line = (name, shape, f"{count:,}", f"{products + transforms:.4f}", f"{transforms:.4f}")
            text += columns.format(*line)
    products, transforms = gmacs[""]
    total = (f"{count_parameters(model):,}", f"{products + transforms:.4f}", f"{transforms:.4f}")
    return text + columns.format("all", f"{input_size} pixels", *total)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.flops", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    is_config = arguments.model.endswith(".py")
    sys.stdout.write((_of_config if is_config else _of_classifier)(arguments))
    return 0


def _of_classifier(arguments: argparse.Namespace) -> str:
    with torch.device("meta"):
        model = build_model(ModelConfig(model=arguments.model), arguments.num_classes)
    cfg = timm.get_pretrained_cfg(arguments.model)
    sizes = arguments.input_size or [cfg.input_size[-1] if cfg else 224]
    if len(sizes) > 1:
        raise UserError("--input-size: a classifier's images are square, give one number")
    return _counted(lambda: table(model, sizes[0]), arguments)


def _of_config(arguments: argparse.Namespace) -> str:
    need_stack()
    config = read_config(arguments.model)
    size = arguments.input_size and (arguments.input_size[0], arguments.input_size[-1])
    return _counted(lambda: flops.table(config, size), arguments)


def _counted(count: Callable[[], str], arguments: argparse.Namespace) -> str:
    try:
        return count()
    except (ValueError, RuntimeError, AssertionError) as error:
        size = " ".join(map(str, arguments.input_size or []))
        raise UserError(f"--input-size {size}: {arguments.model} fails: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
