"""Exports a classifier to one file that other programs run, and checks that it gives the same.

python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --format onnx --output mine.onnx
python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --output small.onnx \\
    --dtype int8 --calibration my_images
python -m tools.export hornet_tiny_gf --checkpoint hornet_tiny_gf.pth --format exported \\
    --dynamic size --output tiny.pt2
"""

import argparse
import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from runtime.errors import UserError, check_positive, near_names, reason_of
from tools.classifier import Classifier, load_classifier, untrained_classifier
from tools.exported import FORMATS, KEY, Exported, Facts, format_of
from tools.outputs import kept_when_done
from tools.quantize import Quality, batches, quality, quantize, split

LARGEST_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Relative to the largest logit; a file beyond is not kept."""
LARGEST_WEIGHT = 2**31
"""Bytes of a weight that is folded into one constant of an ONNX file."""


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
    add("--batch-size", type=int, default=1, help="images at a time, where it is fixed (1)")
    add("--dynamic", choices=("batch", "size"),
        help="any number of images; size: any height and width too")  # fmt: skip
    add("--dtype", choices=(*LARGEST_ERROR, "int8"), default="float32",
        help="of the computation (float32)")  # fmt: skip
    add("--calibration", type=Path, metavar="FOLDER",
        help="images for --dtype int8: some give the ranges, the others show the accuracy, where "
        "they lie in folders of the classes' names")  # fmt: skip
    add("--no-fold", action="store_true", help="leave norms and scales as layers of their own")
    add("--opset", type=int, default=20, help="version of ONNX's operators (20)")
    return this


class _Computed(nn.Module):
    """The model computed in another type, between float32 images and float32 logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def export(
    classifier: Classifier, output: Path, arguments: argparse.Namespace
) -> tuple[dict[str, float], Quality | None]:
    """Writes the file; returns its largest error relative to the largest logit, by input shape.

    Of an int8 file its quality on the images of --calibration instead.

    Raises:
        UserError: the format cannot take the model, or the error is too large; no file is left.
    """
    view, dtype, kind = classifier.view, arguments.dtype, format_of(output)
    is_int8 = dtype == "int8"
    calibration, held_out = split(arguments.calibration) if is_int8 else ([], [])
    batch = None if arguments.dynamic else arguments.batch_size
    facts = Facts(classifier.config.model, classifier.labels, view.input_size, list(view.mean),
                  list(view.std), view.crop_pct, dtype, batch)  # fmt: skip
    ready = copy.deepcopy(classifier.model)
    if not arguments.no_fold:
        ready = reparameterize_model(ready, inplace=True)
    if hasattr(ready, "set_global_filter_impl"):
        ready.set_global_filter_impl("matmul")  # type: ignore[operator]
    # OpenVINO computes in the type that it is told to where it runs, int8 is made of float32
    in_float32 = is_int8 or kind == "openvino"
    computed = _Computed(ready, torch.float32 if in_float32 else getattr(torch, dtype)).eval()
    sizes = [(batch or 2, view.input_size, view.input_size)]
    if arguments.dynamic:
        sizes.append((3, view.input_size, view.input_size))
    if arguments.dynamic == "size":
        sizes.append((1, view.input_size + 32, view.input_size + 96))
    example = torch.randn(sizes[0][0], 3, *sizes[0][1:])
    with kept_when_done(output) as written:
        first = written.with_name("float32.onnx") if is_int8 else written
        with _quiet():
            try:
                _WRITERS[kind](computed, example, first, facts, arguments)
                if is_int8:
                    quantize(first, written, batches(calibration, classifier, batch or 8))
            except ImportError as error:
                raise UserError(
                    f"--format {kind} needs {error.name}: pip install '.[export]' "
                    "(OpenVINO: '.[openvino]')"
                ) from None
            except UserError:
                raise
            except Exception as error:  # each library has its own types
                raise UserError(
                    f"--format {kind} cannot take {facts.model}: {reason_of(error)}"
                ) from None
        try:
            errors = _errors(classifier.model, Exported(first), sizes)
            exported = Exported(written)
        except Exception as error:  # of the library that runs it
            reason = reason_of(error).replace(str(first), output.name)
            raise UserError(
                f"--format {kind}, --dtype {dtype}: the file does not run here, so it is not kept: "
                f"{reason}"
            ) from None
        worst, most = max(errors.values()), LARGEST_ERROR["float32" if is_int8 else dtype]
        if not worst <= most:
            raise UserError(
                f"the exported file differs from PyTorch by {worst:.1e} of the largest logit, more "
                f"than {most:.0e}: it is not kept"
            )
        if not is_int8:
            return errors, None
        first.unlink()
        return {}, quality(classifier.model, exported, held_out, classifier, batch or 8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell of their own workings; their errors are raised all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


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


def _program(
    model: nn.Module, example: Tensor, arguments: argparse.Namespace
) -> torch.export.ExportedProgram:
    shapes = None
    if arguments.dynamic:
        vary = (0,) if arguments.dynamic == "batch" else (0, 2, 3)
        shapes = (dict.fromkeys(vary, torch.export.Dim.DYNAMIC),)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes)


def _write_onnx(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, arguments: argparse.Namespace
) -> None:
    import onnx  # noqa: F401 - what writes the file, named if it is missing
    from onnxscript.optimizer import optimize

    program = torch.onnx.export(
        _program(model, example, arguments),
        (),
        dynamo=True,
        opset_version=arguments.opset,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    if program.model.opset_imports[""] != arguments.opset:
        raise UserError(f"--opset {arguments.opset}: torch.onnx cannot write it; 20 works")
    # weights that are reshaped in the graph become plain ones, which is what quantisation takes
    optimize(program.model, input_size_limit=LARGEST_WEIGHT, output_size_limit=LARGEST_WEIGHT)
    program.model.metadata_props[KEY] = facts.dumps()
    program.save(path)


def _write_torchscript(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, _: argparse.Namespace
) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(model, (example,), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={KEY: facts.dumps()})


def _write_exported(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, arguments: argparse.Namespace
) -> None:
    program = _program(model, example, arguments)
    torch.export.save(program, path, extra_files={KEY: facts.dumps()})


def _write_openvino(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, arguments: argparse.Namespace
) -> None:
    import openvino

    # by way of ONNX: OpenVINO's own reader of programs lacks arithmetic on sizes that vary
    onnx = path.with_suffix(".onnx")
    _write_onnx(model, example, onnx, facts, arguments)
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
            arguments.checkpoint, arguments.model, arguments.ema, arguments.input_size
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
    if (arguments.dtype == "int8") != (arguments.calibration is not None):
        raise UserError("--dtype int8 and --calibration FOLDER go together")
    if arguments.dtype == "int8" and kind != "onnx":
        raise UserError(f"--dtype int8 is for --format onnx, not {kind}")
    if arguments.calibration and not arguments.calibration.is_dir():
        raise UserError(f"--calibration {arguments.calibration} is no folder")
    return kind


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        kind = _check(arguments)
        errors, int8_quality = export(_classifier(arguments), arguments.output, arguments)
    except UserError as error:
        sys.stderr.write(f"tools.export: error: {' '.join(str(error).split())}\n")
        return 1
    for shape, largest in errors.items():
        sys.stdout.write(f"{shape}: largest error {largest:.1e} of the largest logit\n")
    if int8_quality:
        sys.stdout.write(f"{int8_quality}\n")
    files = [arguments.output]
    if kind == "openvino":
        files.append(arguments.output.with_suffix(".bin"))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    weights = "" if arguments.checkpoint else ", random weights: no --checkpoint was given"
    sys.stdout.write(
        f"{arguments.output}: {kind}, {arguments.dtype}, {megabytes:.1f} MB{weights}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
