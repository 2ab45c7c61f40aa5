"""Exports a classifier to one file that other programs run, and checks that it gives the same.

python -m tools.export --checkpoint runs/mine/checkpoint-best.pth --format onnx --output mine.onnx
python -m tools.export hornet_tiny_gf --checkpoint hornet_tiny_gf.pth --format exported \\
    --dynamic size --output tiny.pt2
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from datasets import unnamed
from runtime.errors import UserError, near_names
from tools.classifier import Classifier, View, load_classifier
from tools.exported import FORMATS, KEY, Exported, Facts, format_of
from transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

LARGEST_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Relative to the largest logit; a file beyond is not kept."""


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
    add("--dtype", choices=LARGEST_ERROR, default="float32", help="of the computation (float32)")
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
    classifier: Classifier, name: str, output: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Writes the file; returns its largest error relative to the largest logit, by input shape.

    Raises:
        UserError: the format cannot take the model, or the error is too large; no file is left.
    """
    view, dtype = classifier.view, arguments.dtype
    batch = None if arguments.dynamic else arguments.batch_size
    facts = Facts(name, classifier.classes, view.input_size, list(view.mean), list(view.std),
                  view.crop_pct, dtype, batch)  # fmt: skip
    model = classifier.model.eval()
    ready = model if arguments.no_fold else reparameterize_model(model)
    if hasattr(ready, "set_global_filter_impl"):
        ready.set_global_filter_impl("matmul")  # type: ignore[operator]
    kind = format_of(output)
    # OpenVINO computes in the type that it is told to where it runs
    computed = torch.float32 if kind == "openvino" else getattr(torch, dtype)
    sizes = [(batch or 2, view.input_size, view.input_size)]
    if arguments.dynamic:
        sizes.append((3, view.input_size, view.input_size))
    if arguments.dynamic == "size":
        sizes.append((1, view.input_size + 32, view.input_size + 96))
    example = torch.randn(sizes[0][0], 3, *sizes[0][1:])
    try:
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=".export-"))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    try:
        written = folder / output.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of exporters, about their own workings
            try:
                _WRITERS[kind](_Computed(ready, computed), example, written, facts, arguments)
            except ImportError as error:
                raise UserError(
                    f"--format {kind} needs {error.name}: pip install '.[export]' "
                    "(OpenVINO: '.[openvino]')"
                ) from None
            except Exception as error:  # each library has its own types
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise UserError(f"--format {kind} cannot take {name}: {reason}") from None
        try:
            errors = _errors(model, Exported(written), sizes)
        except Exception as error:  # of the library that runs it
            reason = " ".join(str(error).replace(str(written), output.name).split())[:300]
            raise UserError(
                f"--format {kind}, --dtype {dtype}: the file does not run here, so it is not kept: "
                f"{reason}"
            ) from None
        worst = max(errors.values())
        if not worst <= LARGEST_ERROR[dtype]:
            raise UserError(
                f"the exported file differs from PyTorch by {worst:.1e} of the largest logit, more "
                f"than {LARGEST_ERROR[dtype]:.0e}: it is not kept"
            )
        for file in folder.iterdir():  # OpenVINO has its weights in a second file
            os.replace(file, output.parent / file.name)
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return errors


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
        return torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)


def _write_onnx(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, arguments: argparse.Namespace
) -> None:
    import onnx  # noqa: F401 - what writes the file, named if it is missing
    import onnxscript  # noqa: F401 - as above

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
    program.model.metadata_props[KEY] = facts.dumps()
    program.save(path)


def _write_torchscript(
    model: nn.Module, example: Tensor, path: Path, facts: Facts, _: argparse.Namespace
) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), (example,), check_trace=False)
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


def _classifier(arguments: argparse.Namespace) -> tuple[Classifier, str]:
    known = timm.list_models("hornet_*")
    if arguments.model and not timm.is_model(arguments.model):
        raise UserError(f"there is no model {arguments.model}{near_names(arguments.model, known)}")
    if arguments.checkpoint:
        found = load_classifier(
            arguments.checkpoint, arguments.model, arguments.ema, arguments.input_size
        )
        return found, arguments.model or type(found.model).__name__
    if not arguments.model:
        raise UserError("give --checkpoint FILE, or a model to export with random weights")
    sys.stderr.write(f"{arguments.model} with random weights: no --checkpoint was given\n")
    cfg = timm.get_pretrained_cfg(arguments.model)
    size = arguments.input_size or (cfg.input_size[-1] if cfg else 224)
    torch.manual_seed(0)
    model = timm.create_model(arguments.model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gamma" in parameter_name:
                parameter.fill_(0.5)  # as small as at first, they would hide every error
    num_classes: int = model.num_classes  # type: ignore[assignment]
    view = View(size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Classifier(model, unnamed(num_classes), view), arguments.model


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        kind = format_of(arguments.output)
        if arguments.format not in (None, kind):
            suffix = FORMATS[arguments.format]
            raise UserError(
                f"--output {arguments.output}: --format {arguments.format} ends in {suffix}"
            )
        for name in ("batch_size", "input_size", "opset"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: has to be at least 1")
        if not arguments.output.parent.is_dir():
            raise UserError(f"--output {arguments.output}: {arguments.output.parent} is no folder")
        classifier, name = _classifier(arguments)
        errors = export(classifier, name, arguments.output, arguments)
    except UserError as error:
        sys.stderr.write(f"tools.export: error: {' '.join(str(error).split())}\n")
        return 1
    for shape, largest in errors.items():
        sys.stdout.write(f"{shape}: largest error {largest:.1e} of the largest logit\n")
    files = [arguments.output]
    if kind == "openvino":
        files.append(arguments.output.with_suffix(".bin"))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    sys.stdout.write(f"{arguments.output}: {kind}, {arguments.dtype}, {megabytes:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
