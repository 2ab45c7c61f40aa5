"""Weights in another form, the same to the last bit.

python -m tools.convert runs/mine/checkpoint-best.pth mine.safetensors
python -m tools.convert hornet_tiny_gf.in1k hornet_tiny_gf
python -m tools.convert hornet_tiny_gf hornet_tiny_gf.pth

The form is what the name of the output ends in: .pth for one that the release reads, too,
.safetensors, or none for a folder in the form of timm and Hugging Face (config.json,
model.safetensors, README.md), which timm.create_model('local-dir:FOLDER', pretrained=True) loads.
"""

import argparse
import sys
from pathlib import Path

from inference.convert import convert
from runtime.errors import run_program


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.convert",
        description="Writes a classifier's weights in another form: .pth, .safetensors or a folder "
        "of timm's.",
    )
    add = this.add_argument
    add("source", help="path, address, or name of published weights; or a folder of timm's")
    add("output", type=Path, help="FILE.pth, FILE.safetensors, or a new folder")
    add("--model", default="", help="its model, where the source names none")
    add("--ema", action="store_true", help="take the EMA of the weights")
    return this


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.convert", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    output = arguments.output
    classifier = convert(arguments.source, output, arguments.model, arguments.ema)
    sys.stdout.write(f"{output}: {classifier.config.model}, {len(classifier.classes)} classes\n")
    if not output.suffix:
        sys.stdout.write(
            f"timm.create_model('local-dir:{output}', pretrained=True) loads it once the "
            "models are registered (import models, or hornet)\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
