"""Exports a classifier to one file that other programs run, and checks that it gives the same.

python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --format onnx --output mine.onnx
python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --output small.onnx \\
    --dtype int8 --calibration my_images
python -m tools.export hornet_tiny_gf --checkpoint hornet_tiny_gf.pth --format exported \\
    --dynamic size --output tiny.pt2
"""

import argparse
import copy
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import models
from runtime.errors import UserError, check_positive, near_names, reason_of, run_program
from runtime.files import written_whole
from tools.classifier import Classifier, load_classifier, untrained_classifier
from tools.exported import FORMATS, KEY, Exported, Facts, format_of, needing_packages, quiet
from tools.quantize import Quality, batches, quality, quantize, split

LARGEST_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Relative to the largest logit; a file beyond is not kept."""
LARGEST_WEIGHT = 2**31
"""Elements of a weight that is folded into one constant of an ONNX file."""


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.export",
        description="Exports a classifier to one file, checked against PyTorch.",
    )
    add = this.add_argument
    add("model", nargs="?", default="", help="its model, where the checkpoint names none")
    add("--checkpoint", help="path, address, or name of published weights; random ones without")
    add("--ema", action="store_true", help="take the moving average of the weights")
    add("--format", choices=FORMATS, help="as the suffix of --output says, if not given")
    add("--output", type=Path, required=True, metavar="FILE",
        help=f"with the suffix of its format: {', '.join(FORMATS.values())}")  # fmt: skip
    add("--input-size", type=int, help="pixels; as in the checkpoint's run if not given")
    add("--batch-size", type=int, help="images at a time (1)")
    add("--dynamic", choices=("batch", "size"),
        help="any number of images; size: any height and width too")  # fmt: skip
    add("--dtype", choices=(*LARGEST_ERROR, "int8"), default="float32",
        help="of the computation (float32)")  # fmt: skip
    add("--calibration", type=Path, metavar="FOLDER",
        help="images for --dtype int8: some give the ranges, the others show the accuracy, where "
        "they lie in folders of the classes' names")  # fmt: skip
    add("--no-fold", action="store_true", help="leave norms and scales as layers of their own")
    add("--opset", type=int, help="version of ONNX's operators (20)")
    return this


@dataclass(frozen=True)
class Options:
    """How to export."""

    dtype: str = "float32"
    """Of the computation: a key of LARGEST_ERROR, or int8."""
    batch_size: int | None = 1
    """Images at a time; None for any number."""
    any_size: bool = False
    """Whether images may have any height and width."""
    folds: bool = True
    """Whether norms and scales go into the layers beside them."""
    opset: int = 20
    """Version of ONNX's operators."""


class _Computed(nn.Module):
    """The model computed in another type, between float32 images and float32 logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def export(classifier: Classifier, output: Path, options: Options) -> dict[str, float]:
    """Writes the file; returns its largest error relative to the largest logit, by input shape.

    Raises:
        UserError: the format cannot take the model, or the error is too large; no file is left.
    """
    with written_whole(output) as written:
        return _write(classifier, written, options)


def export_int8(
    classifier: Classifier, output: Path, options: Options, calibration: Path
) -> Quality:
    """Writes an ONNX file that computes in int8, with ranges from the images in a folder.

    Returns what it costs on those of the images that did not give the ranges.

    Raises:
        UserError: as `export`, or there are too few images.
    """
    images, held_out = split(calibration)
    size = options.batch_size or 8
    with written_whole(output) as written:
        in_float32 = written.with_name(f"{written.stem}.float32.onnx")
        _write(classifier, in_float32, options)
        with _exporting("onnx", classifier.config.model):
            quantize(in_float32, written, batches(images, classifier, size))
        in_float32.unlink()
        return quality(classifier.model, Exported(written), held_out, classifier, size)


def _write(classifier: Classifier, path: Path, options: Options) -> dict[str, float]:
    """As `export`; what int8 is made of is float32."""
    view, kind = classifier.view, format_of(path)
    dtype = "float32" if options.dtype == "int8" else options.dtype
    facts = Facts(classifier.config.model, classifier.labels, view.input_size, list(view.mean),
                  list(view.std), view.crop_pct, options.dtype, options.batch_size,
                  options.any_size)  # fmt: skip
    ready = models.plain(copy.deepcopy(classifier.model))
    if options.folds:
        ready = reparameterize_model(ready, inplace=True)
    models.set_global_filter_impl(ready, "matmul")
    # OpenVINO computes in the type that it is told to where it runs
    computed = _Computed(ready, torch.float32 if kind == "openvino" else getattr(torch, dtype))
    sizes = [(options.batch_size or 2, view.input_size, view.input_size)]
    if options.batch_size is None:
        sizes.append((3, view.input_size, view.input_size))
    if options.any_size:
        sizes.append((1, view.input_size + 32, view.input_size + 96))
    example = torch.randn(sizes[0][0], 3, *sizes[0][1:])
    with _exporting(kind, facts.model):
        _WRITERS[kind](computed.eval(), example, path, facts, options)
    try:
        errors = _errors(classifier.model, Exported(path), sizes)
    except Exception as error:  # of the library that runs it
        raise UserError(
            f"--format {kind}, --dtype {dtype}: the file does not run here, so it is not kept: "
            f"{reason_of(error).replace(str(path), 'it')}"
        ) from None
    most = LARGEST_ERROR[dtype]
    for shape, largest in errors.items():
        if not largest <= most:  # nor where it is no number
            raise UserError(
                f"the exported file differs from PyTorch by {largest:.1e} of the largest logit at "
                f"{shape}, more than {most:.0e}: it is not kept"
            )
    return errors


@contextmanager
def _exporting(kind: str, model: str) -> Iterator[None]:
    """One line of what goes wrong in the body, and nothing of what exporters tell otherwise."""
    try:
        with quiet(), needing_packages(f"--format {kind}"):
            yield
    except (UserError, OSError):
        raise
    except Exception as error:  # each library has its own types
        raise UserError(f"--format {kind} cannot take {model}: {reason_of(error)}") from None


@torch.no_grad()
def _errors(
    model: nn.Module, exported: Exported, sizes: list[tuple[int, int, int]]
) -> dict[str, float]:
    errors = {}
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        expected = model(images)
        error = (exported(images) - expected).abs().max() / expected.abs().max()
        errors[f"{batch} x 3 x {height} x {width}"] = float(error)
    return errors


def _program(model: nn.Module, example: Tensor, options: Options) -> torch.export.ExportedProgram:
    shapes = None
    if options.batch_size is None:
        vary = (0, 2, 3) if options.any_size else (0,)
        shapes = (dict.fromkeys(vary, torch.export.Dim.DYNAMIC),)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes)


def _write_onnx(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, options: Options
) -> None:
    import onnx  # noqa: F401 - what writes the file, named if it is missing
    from onnxscript.optimizer import optimize

    program = torch.onnx.export(
        _program(model, example, options),
        (),
        dynamo=True,
        opset_version=options.opset,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    if program.model.opset_imports[""] != options.opset:
        raise UserError(f"--opset {options.opset}: torch.onnx cannot write it; 20 works")
    # weights that are reshaped in the graph become plain ones, which is what quantisation takes
    optimize(program.model, input_size_limit=LARGEST_WEIGHT, output_size_limit=LARGEST_WEIGHT)
    program.model.metadata_props[KEY] = facts.dumps()
    program.save(path)


def _write_torchscript(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, _: Options
) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(model, (example,), check_trace=False)
    # in memory first: on a full disk its writer would end the process
    data = io.BytesIO()
    torch.jit.save(traced, data, _extra_files={KEY: facts.dumps()})
    path.write_bytes(data.getbuffer())


def _write_exported(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, options: Options
) -> None:
    program = _program(model, example, options)
    data = io.BytesIO()  # as above
    torch.export.save(program, data, extra_files={KEY: facts.dumps()})
    path.write_bytes(data.getbuffer())


def _write_openvino(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, options: Options
) -> None:
    import openvino

    # by way of ONNX: OpenVINO's own reader of programs lacks arithmetic on sizes that vary
    onnx = path.with_suffix(".onnx")
    _write_onnx(model, example, onnx, facts, options)
    converted = openvino.convert_model(onnx)
    converted.set_rt_info(facts.dumps(), [KEY])
    openvino.save_model(converted, path, compress_to_fp16=facts.dtype == "float16")
    onnx.unlink()


_WRITERS: dict[str, Any] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "exported": _write_exported,
    "openvino": _write_openvino,
}


def _classifier(arguments: argparse.Namespace) -> Classifier:
    known = timm.list_models("hornet_*")
    if arguments.model and not timm.is_model(arguments.model):
        raise UserError(f"there is no model {arguments.model}{near_names(arguments.model, known)}")
    if arguments.checkpoint:
        return load_classifier(
            arguments.checkpoint,
            arguments.model,
            arguments.ema,
            arguments.input_size,
            takes_exported=False,
        )
    if not arguments.model:
        raise UserError("give --checkpoint FILE, or a model to export with random weights")
    return random_classifier(arguments.model, arguments.input_size)


def random_classifier(model: str, input_size: int | None = None) -> Classifier:
    """A model with weights drawn by a fixed seed, whose every block shows in the logits."""
    cfg = timm.get_pretrained_cfg(model)
    size = input_size or (cfg.input_size[-1] if cfg else 224)
    torch.manual_seed(0)
    network = timm.create_model(model).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)  # as small as at first, they would hide every error
    return untrained_classifier(network, model, size)


def _check(arguments: argparse.Namespace) -> str:
    """The format; raises UserError for arguments that contradict each other."""
    kind = format_of(arguments.output)
    if arguments.format not in (None, kind):
        suffix = FORMATS[arguments.format]
        raise UserError(
            f"--output {arguments.output}: --format {arguments.format} ends in {suffix}"
        )
    check_positive(arguments, "batch_size", "input_size", "opset")
    if not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output}: {arguments.output.parent} is no folder")
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output} is a folder: give a file")
    if (kind, arguments.dtype) == ("onnx", "bfloat16"):
        raise UserError("--dtype bfloat16: ONNX Runtime has none on CPUs, where files are checked")
    if arguments.ema and not arguments.checkpoint:
        raise UserError("--ema is the average in a checkpoint: give --checkpoint")
    if arguments.dynamic and arguments.batch_size:
        raise UserError("--batch-size is fixed, --dynamic is any number: give one of them")
    if arguments.opset and kind not in ("onnx", "openvino"):
        raise UserError(f"--opset is ONNX's: --format {kind} has none")
    if (arguments.dtype == "int8") != (arguments.calibration is not None):
        raise UserError("--dtype int8 and --calibration FOLDER go together")
    if arguments.dtype == "int8" and kind != "onnx":
        raise UserError(f"--dtype int8 is for --format onnx, not {kind}")
    if arguments.calibration and not arguments.calibration.is_dir():
        raise UserError(f"--calibration {arguments.calibration} is no folder")
    return kind


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.export", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    kind = _check(arguments)
    classifier, output = _classifier(arguments), arguments.output
    options = Options(
        arguments.dtype,
        None if arguments.dynamic else arguments.batch_size or 1,
        arguments.dynamic == "size",
        not arguments.no_fold,
        arguments.opset or Options.opset,
    )
    if arguments.calibration:
        told = [str(export_int8(classifier, output, options, arguments.calibration))]
    else:
        errors = export(classifier, output, options)
        told = [f"{at}: largest error {e:.1e} of the largest logit" for at, e in errors.items()]
    files = [output, output.with_suffix(".bin")] if kind == "openvino" else [output]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    weights = "" if arguments.checkpoint else ", random weights: no --checkpoint was given"
    told.append(f"{output}: {kind}, {arguments.dtype}, {megabytes:.1f} MB{weights}")
    sys.stdout.write("\n".join(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
