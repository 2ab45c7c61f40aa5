"""Exports of a classifier to one file that other programs run, checked against PyTorch."""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import models
from inference.classifier import Classifier, untrained_classifier
from inference.exported import KEY, Exported, Facts, format_of, quiet_library
from inference.quantize import Quality, batches, quality, quantize, split
from runtime.errors import UserError, reason_of
from runtime.files import written_whole

# relative to the largest logit; files with a larger error are not kept
LARGEST_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
LARGEST_WEIGHT = 2**31  # elements of a weight that may become a constant of an ONNX file


@dataclass(frozen=True)
class Options:
    dtype: str = "float32"  # of the computation: a key of LARGEST_ERROR, or int8
    batch_size: int | None = 1  # images per run; None for any number
    any_size: bool = False  # allow images of any height and width
    folds: bool = True  # fold norms and scales into neighbouring layers
    opset: int = 20  # version of ONNX's operators


class _Computed(nn.Module):
    """Computes a model in another dtype; images and logits are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def export(classifier: Classifier, output: Path, options: Options) -> dict[str, float]:
    """Write the file; return its largest error per input shape, relative to the largest logit.

    Raises UserError if the format cannot take the model, or an error is too large; no file is left.
    """
    with written_whole(output) as written:
        return _write(classifier, written, options)


def export_int8(classifier: Classifier, output: Path, options: Options, folder: Path) -> Quality:
    """Write an ONNX file that computes in int8, calibrated with some images of `folder`.

    Return its quality on the other images. Raises UserError as `export`, or for too few images.
    """
    images, held_out = split(folder)
    size = options.batch_size or 8
    with written_whole(output) as written:
        in_float32 = written.with_name(f"{written.stem}.float32.onnx")
        _write(classifier, in_float32, options)
        with _exporting("onnx", classifier.config.model):
            quantize(in_float32, written, batches(images, classifier, size))
        in_float32.unlink()
        return quality(classifier, Exported(written), held_out, size)


def _write(classifier: Classifier, path: Path, options: Options) -> dict[str, float]:
    """Like `export`; for int8, write the float32 file that is quantised later."""
    view, kind, name = classifier.preprocessing, format_of(path), classifier.config.model
    dtype = "float32" if options.dtype == "int8" else options.dtype
    side = view.input_size
    facts = Facts(name, classifier.labels, side, list(view.mean), list(view.std), view.crop_pct,
                  options.dtype, options.batch_size, options.any_size,
                  view.decoding.exif_orientation, view.decoding.background)  # fmt: skip
    ready = models.plain(copy.deepcopy(classifier.model))
    if options.folds:
        ready = reparameterize_model(ready, inplace=True)
    models.set_global_filter_impl(ready, "matmul")
    # OpenVINO computes in the dtype that it is given when it runs
    computed = _Computed(ready, torch.float32 if kind == "openvino" else getattr(torch, dtype))
    shapes: list[tuple[int, ...]] = [(options.batch_size or 2, 3, side, side)]
    if options.batch_size is None:
        shapes.append((3, 3, side, side))
    if options.any_size:
        shapes.append((1, 3, side + 32, side + 96))
    with _exporting(kind, name):
        _WRITERS[kind](computed.eval(), torch.randn(shapes[0]), path, facts.dumps(), options)
    try:
        errors = _errors(classifier.model, Exported(path), shapes)
    except Exception as error:  # each library has its own types
        raise UserError(
            f"--format {kind}, --dtype {dtype}: the file does not run here, so it is not kept: "
            f"{reason_of(error).replace(str(path), 'it')}"
        ) from None
    for shape, largest in errors.items():
        if not largest <= LARGEST_ERROR[dtype]:  # also NaN
            raise UserError(
                f"the exported file differs from PyTorch by {largest:.1e} of the largest logit at "
                f"{shape}, more than {LARGEST_ERROR[dtype]:.0e}: it is not kept"
            )
    return errors


@contextmanager
def _exporting(kind: str, model: str) -> Iterator[None]:
    """Hide what exporters print, and turn their errors into a UserError."""
    try:
        with quiet_library(f"--format {kind}"):
            yield
    except (UserError, OSError):
        raise
    except Exception as error:  # each library has its own types
        raise UserError(f"--format {kind} cannot take {model}: {reason_of(error)}") from None


@torch.no_grad()
def _errors(model: nn.Module, other: Exported, shapes: list[tuple[int, ...]]) -> dict[str, float]:
    errors = {}
    for shape in shapes:
        images = torch.randn(shape)
        expected = model(images)
        error = (other(images) - expected).abs().max() / expected.abs().max()
        errors[" x ".join(map(str, shape))] = float(error)
    return errors


def _program(model: nn.Module, images: Tensor, options: Options) -> torch.export.ExportedProgram:
    shapes = None
    if options.batch_size is None:
        vary = (0, 2, 3) if options.any_size else (0,)
        shapes = (dict.fromkeys(vary, torch.export.Dim.DYNAMIC),)
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


def _onnx(model: nn.Module, images: Tensor, path: Path, facts: str, options: Options) -> None:
    import onnx  # noqa: F401 - named in the error if it is missing
    from onnxscript.optimizer import optimize

    program = torch.onnx.export(
        _program(model, images, options),
        (),
        opset_version=options.opset,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    if program.model.opset_imports[""] != options.opset:
        raise UserError(f"--opset {options.opset}: torch.onnx cannot write it; 20 works")
    # quantisation takes plain weights only, not those that are reshaped in the graph
    optimize(program.model, input_size_limit=LARGEST_WEIGHT, output_size_limit=LARGEST_WEIGHT)
    program.model.metadata_props[KEY] = facts
    program.save(path)


def _torch(model: nn.Module, images: Tensor, path: Path, facts: str, options: Options) -> None:
    extra, data = {KEY: facts}, io.BytesIO()  # on a full disk torch would end the process
    if format_of(path) == "exported":
        torch.export.save(_program(model, images, options), data, extra_files=extra)
    else:
        with torch.no_grad():
            traced = torch.jit.trace(model, (images,), check_trace=False)
        torch.jit.save(traced, data, _extra_files=extra)
    path.write_bytes(data.getbuffer())


def _openvino(model: nn.Module, images: Tensor, path: Path, facts: str, options: Options) -> None:
    import openvino

    # via ONNX: OpenVINO's reader of torch.export programs lacks arithmetic on dynamic sizes
    onnx = path.with_suffix(".onnx")
    _onnx(model, images, onnx, facts, options)
    converted = openvino.convert_model(onnx)
    converted.set_rt_info(facts, [KEY])
    openvino.save_model(converted, path, compress_to_fp16=options.dtype == "float16")
    onnx.unlink()


_WRITERS = dict(onnx=_onnx, torchscript=_torch, exported=_torch, openvino=_openvino)


def random_classifier(model: str, input_size: int | None = None) -> Classifier:
    """Return a model with random weights of a fixed seed, in which every block affects the logits.

    The layer scale is 0.5: with its small initial values no error in a block would show.
    """
    cfg = timm.get_pretrained_cfg(model)
    size = input_size or (cfg.input_size[-1] if cfg else 224)
    torch.manual_seed(0)
    network = timm.create_model(model).eval()
    for name, parameter in network.named_parameters():
        if "gamma" in name:
            nn.init.constant_(parameter, 0.5)
    return untrained_classifier(network, model, size)
