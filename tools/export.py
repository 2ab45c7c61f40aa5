"""Exports a classifier for other programs, and compares it with PyTorch.

python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --output mine.onnx
python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --target opencv --output mine.onnx
python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --output small.onnx \\
    --dtype int8 --calibration my_images
python -m tools.export hornet_tiny_gf --checkpoint hornet_tiny_gf.pth --format exported \\
    --dynamic size --output tiny.pt2
"""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

import timm

from inference.classifier import Classifier, add_size_flag, classifier_of
from inference.export import LARGEST_ERROR, export, export_int8, random_classifier
from inference.exported import FORMATS, companions, format_of
from inference.targets import OPSETS, TARGETS, Options, Target
from runtime.errors import Parser, UserError, check_positive, near_names, program
from runtime.sizes import sides


def parser() -> Parser:
    this = Parser("python -m tools.export", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("model", nargs="?", default="", help="its model, if the checkpoint does not name it")
    add("--checkpoint", help="path, URL, or name of published weights; by default random weights")
    add("--ema", action="store_true", help="take the EMA of the weights")
    add("--target", choices=TARGETS,
        help="the program or device that will run it: sets what it needs")  # fmt: skip
    add("--format", choices=FORMATS, help="by default that of the suffix of --output")
    add("--output", type=Path, required=True, metavar="FILE",
        help=f"with the suffix of its format: {', '.join(FORMATS.values())}")  # fmt: skip
    add_size_flag(this)
    add("--batch-size", type=int, help="images per run (1)")
    add("--dynamic", choices=("batch", "size"),
        help="batch: any number of images; size: also any height and width")  # fmt: skip
    add("--dtype", choices=(*LARGEST_ERROR, "int8"), default="float32",
        help="of the computation (float32)")  # fmt: skip
    add("--calibration", type=Path, metavar="FOLDER",
        help="images for --dtype int8: some calibrate it, the others show the accuracy, if they "
        "are in class folders")  # fmt: skip
    add("--no-fold", action="store_true", help="keep norms and scales as separate layers")
    add("--opset", type=int, help="version of ONNX's operators (20, or what --target needs)")
    return this


def _classifier(arguments: Namespace) -> Classifier:
    model, known = arguments.model, timm.list_models("hornet_*")
    if model and not timm.is_model(model):
        raise UserError(f"there is no model {model}{near_names(model, known)}")
    if arguments.checkpoint:
        return classifier_of(arguments, takes_exported=False)
    if not model:
        raise UserError("give --checkpoint FILE, or a model to export with random weights")
    return random_classifier(model, arguments.input_size)


def _check(arguments: Namespace) -> Target:
    """Return what the file is for; UserError for flags that cannot work."""
    kind, output = format_of(arguments.output), arguments.output
    name = arguments.target or next(name for name, t in TARGETS.items() if t.format == kind)
    target, user = TARGETS[name], f"--target {name}" if arguments.target else f"--output {output}"
    for flag, needed in ((f"--format {arguments.format}", arguments.format), (user, target.format)):
        if needed not in (None, kind):
            raise UserError(f"--output {output}: files for {flag} end in {FORMATS[needed]}")
    check_positive(arguments, "batch_size", "opset")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is not a folder")
    if output.is_dir():
        remedy = "remove it, or give another name" if kind == "coreml" else "give a file"
        raise UserError(f"--output {output} is a folder: {remedy}")
    if arguments.ema and not arguments.checkpoint:
        raise UserError("--ema needs a checkpoint: give --checkpoint")
    if arguments.dynamic and arguments.batch_size:
        raise UserError("--batch-size is fixed, --dynamic is any number: give one of them")
    if target.one_image and (arguments.batch_size or 1) > 1:
        raise UserError(f"--batch-size {arguments.batch_size}: {user} takes one image at a time")
    if arguments.dynamic and arguments.dynamic not in target.dynamic:
        takes = "a fixed size" if "batch" in target.dynamic else "fixed shapes"
        raise UserError(f"--dynamic {arguments.dynamic}: {user} takes {takes}")
    if arguments.opset and not target.opsets:
        raise UserError(f"--opset is ONNX's: --format {kind} has none")
    if arguments.opset and arguments.opset not in target.opsets:
        works = f"{OPSETS[0]} to {OPSETS[-1]}"
        if len(target.opsets) < len(OPSETS):
            works = " and ".join(map(str, sorted(target.opsets)))
        raise UserError(f"--opset {arguments.opset}: {user} takes {works}")
    if arguments.dtype not in target.dtypes:
        raise UserError(f"--dtype {arguments.dtype}: {user} takes {', '.join(target.dtypes)}")
    if (arguments.dtype == "int8") != (arguments.calibration is not None):
        raise UserError("--dtype int8 and --calibration FOLDER go together")
    if arguments.calibration and not arguments.calibration.is_dir():
        raise UserError(f"--calibration {arguments.calibration} is not a folder")
    return target


@program(parser)
def main(arguments: Namespace) -> None:
    target = _check(arguments)
    classifier, output = _classifier(arguments), arguments.output
    dynamic, kind = arguments.dynamic, target.format
    if arguments.target == "web" and classifier.preprocessing.decoding.as_array:
        raise UserError("--target web: browsers read 8-bit colours only, not this network's pixels")
    options = Options(
        arguments.dtype,
        None if dynamic else arguments.batch_size or 1,
        dynamic == "size",
        not arguments.no_fold,
        arguments.opset or next(iter(target.opsets), Options.opset),
        target.symmetric,
    )
    if arguments.calibration:
        told = [str(export_int8(classifier, output, options, arguments.calibration))]
    else:
        errors = export(classifier, output, options)
        told = [f"{at}: largest error {e:.1e} of the largest logit" for at, e in errors.items()]
    if kind == "coreml":
        told = ["not compared with PyTorch, since this project runs no Core ML files"]
    weights = "" if arguments.checkpoint else ", random weights: no --checkpoint was given"
    told.append(f"{output}: {kind}, {arguments.dtype}, {_size(output):.1f} MB{weights}")
    if arguments.target:
        names = {"file": output, "stem": output.with_suffix("")}
        quoted = {name: shlex.quote(str(path)) for name, path in names.items()}
        view = classifier.preprocessing
        image = "x".join(map(str, (view.decoding.channels, *sides(view.input_size))))
        usage = target.usage + (target.usage_dynamic if dynamic else "")
        usage = usage.format(**quoted, path=str(output), image=image)
        told.append(f"next: {usage}")
    sys.stdout.write("\n".join(told) + "\n")


def _size(output: Path) -> float:
    """Return the size in MB, with the file or folder of the weights."""
    files = [output, *output.rglob("*"), *companions(output)]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
