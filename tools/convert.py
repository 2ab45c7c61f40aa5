"""Converts a classifier's weights to .pth, .safetensors or a folder of timm's.

python -m tools.convert runs/mine/checkpoint-best.pth mine.safetensors
python -m tools.convert hornet_tiny_gf.in1k hornet_tiny_gf
python -m tools.convert hornet_tiny_gf hornet_tiny_gf.pth
python -m tools.convert runs/mine/checkpoint-best.pth mine.pth --layout mmpretrain

The suffix of the output determines the format: .pth, which the release reads, too; .safetensors; or
none for a folder in the format of timm and Hugging Face (config.json, model.safetensors,
README.md), which timm.create_model('local-dir:FOLDER', pretrained=True) loads.
"""

import sys
from argparse import Namespace
from pathlib import Path

from inference.convert import convert
from runtime.errors import Parser, program


def parser() -> Parser:
    this = Parser("python -m tools.convert", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("source", help="path, URL, or name of published weights; or a folder of timm's")
    add("output", type=Path, help="FILE.pth, FILE.safetensors, or a new folder")
    add("--model", default="", help="its model, if the source does not name it")
    add("--ema", action="store_true", help="take the EMA of the weights")
    add("--layout", default="", choices=["mmpretrain"], help="names of mmpretrain, in FILE.pth")
    return this


@program(parser)
def main(arguments: Namespace) -> None:
    output = arguments.output
    classifier = convert(arguments.source, output, arguments.model, arguments.ema, arguments.layout)
    sys.stdout.write(f"{output}: {classifier.config.model}, {len(classifier.classes)} classes\n")
    if not output.suffix:
        sys.stdout.write(
            f"timm.create_model('local-dir:{output}', pretrained=True) loads it once the "
            "models are registered (import models, or hornet)\n"
        )


if __name__ == "__main__":
    sys.exit(main())
