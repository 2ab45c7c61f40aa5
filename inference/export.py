"""Exports of a classifier to files that other programs run, checked against PyTorch."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import models
from inference.classifier import Classifier, untrained_classifier
from inference.exported import KEY, Exported, Facts, format_of, quiet_library
from inference.mobile import write_coreml, write_executorch, write_litert, write_ncnn
from inference.portable import portable
from inference.quantize import Quality, batches, quality, quantize, split
from inference.targets import TARGETS, Options
from runtime.errors import UserError, reason_of
from runtime.files import written_whole
from runtime.sizes import Size, as_size, sides, size_text

# relative to the largest logit; files with a larger error are not kept
LARGEST_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
SMALLEST_TRACED = 64  # pixels: the last stage has maps of 2 x 2 then
LARGEST_WEIGHT = 2**31  # elements of a weight that may become a constant of an ONNX file


class _Computed(nn.Module):
    """Computes a model in its own dtype; images and logits are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        if self.dtype == torch.float32:  # conversions would be operators of the graph
            return self.model(images)
        return self.model(images.to(self.dtype)).float()


def export(classifier: Classifier, output: Path, options: Options) -> dict[str, float]:
    """Write the file; return its largest error per input shape, relative to the largest logit.

    Nothing is returned for Core ML, whose files are not run here. Raises UserError if the
    format cannot take the model, or an error is too large; no file is left.
    """
    with written_whole(output) as written:
        return _write(classifier, written, options)


def export_int8(classifier: Classifier, output: Path, options: Options, folder: Path) -> Quality:
    """Write an ONNX file that computes in int8, calibrated with some images of `folder`.

    Return its quality on the other images. Raises UserError as `export`, or for too few images.
    """
    images, held_out = split(folder, classifier.preprocessing.decoding)
    size = options.batch_size or 8
    with written_whole(output) as written:
        in_float32 = written.with_name(f"{written.stem}.float32.onnx")
        _write(classifier, in_float32, options)
        with _exporting("onnx", classifier.config.model):
            quantize(in_float32, written, batches(images, classifier, size), options.symmetric)
        in_float32.unlink()
        return quality(classifier, Exported(written), held_out, size)


def _write(classifier: Classifier, path: Path, options: Options) -> dict[str, float]:
    """Like `export`; for int8, write the float32 file that is quantised later."""
    view, kind, name = classifier.preprocessing, format_of(path), classifier.config.model
    dtype = "float32" if options.dtype == "int8" else options.dtype
    height, width = sides(view.input_size)
    channels = view.decoding.channels
    span = view.decoding.value_range and list(view.decoding.value_range)
    facts = Facts(name, classifier.labels, view.input_size,
                  list(view.mean), list(view.std), view.crop_pct, options.dtype,
                  options.batch_size, options.any_size,
                  view.decoding.exif_orientation, view.decoding.background,
                  classifier.multi_label, channels, span)  # fmt: skip
    if options.any_size and min(height, width) < SMALLEST_TRACED:
        raise UserError(
            f"--dynamic size at {size_text(view.input_size)} pixels: maps of one pixel would fix "
            f"the size; give --input-size {SMALLEST_TRACED} or more"
        )
    dtypes = next(t.dtypes for t in TARGETS.values() if t.format == kind)
    if options.dtype not in dtypes:
        raise UserError(f"an export to {kind} computes in {', '.join(dtypes)}, not {options.dtype}")
    ready = models.plain(copy.deepcopy(classifier.model))
    if options.folds:
        ready = reparameterize_model(ready, inplace=True)
    # the others take float32, and round by themselves
    compute = getattr(torch, dtype if kind in ("onnx", "torchscript", "exported") else "float32")
    shapes: list[tuple[int, ...]] = [(options.batch_size or 2, channels, height, width)]
    if options.batch_size is None:
        shapes.append((3, channels, height, width))
    if options.any_size:
        shapes.append((1, channels, height + 32, width + 96))
    # ExecuTorch does not take weights that are channels-last in memory
    ready = ready.to(compute, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    ready = portable(ready, None if options.any_size else shapes[0])
    computed = _Computed(ready, compute).eval()
    with _exporting(kind, name):
        _WRITERS[kind](computed, torch.randn(shapes[0]), path, facts.dumps(), options)
    if kind == "coreml":
        return {}
    try:
        errors = _errors(classifier.model, Exported(path), shapes)
    except Exception as error:  # each library has its own types
        raise UserError(
            f"the export to {kind} in {dtype} does not run here, so it is not kept: "
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
        with quiet_library(f"an export to {kind}", kind):
            yield
    except (UserError, OSError):
        raise
    except Exception as error:  # each library has its own types
        raise UserError(f"the export of {model} to {kind} fails: {reason_of(error)}") from None


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
    import onnx_ir
    from onnxscript.optimizer import optimize

    graph = (_onnx_by_tracing if options.opset < 18 else _onnx_of_program)(model, images, options)
    if graph.opset_imports[""] != options.opset:
        raise UserError(f"--opset {options.opset}: this torch cannot write it; 17 and 20 work")
    # quantisation takes plain weights only, not those that are reshaped in the graph
    optimize(graph, input_size_limit=LARGEST_WEIGHT, output_size_limit=LARGEST_WEIGHT)
    for node in graph.graph:
        node.metadata_props.clear()  # where it was called in this machine's files
        # OpenCV 4 refuses a constant that is the first factor of several products
        factor = node.inputs[0] if node.op_type == "MatMul" else None
        if factor is not None and factor.is_initializer() and len(factor.uses()) > 1:
            copied = onnx_ir.Value(name=f"{factor.name}.{node.name}", type=factor.type,
                                   shape=factor.shape, const_value=factor.const_value)  # fmt: skip
            graph.graph.register_initializer(copied)
            node.replace_input_with(0, copied)
    graph.metadata_props[KEY] = facts
    onnx_ir.save(graph, path)


def _onnx_of_program(model: nn.Module, images: Tensor, options: Options) -> Any:
    program = torch.onnx.export(
        _program(model, images, options),
        (),
        opset_version=options.opset,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return program.model


def _onnx_by_tracing(model: nn.Module, images: Tensor, options: Options) -> Any:
    """Opsets before 18 have only this exporter."""
    import onnx
    import onnx_ir

    names = {0: "batch"} | ({2: "height", 3: "width"} if options.any_size else {})
    varying = {"images": names, "logits": {0: "batch"}} if options.batch_size is None else None
    data = io.BytesIO()
    torch.onnx.export(
        model,
        (images,),
        data,  # type: ignore[arg-type]
        dynamo=False,
        opset_version=options.opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes=varying,
    )
    return onnx_ir.from_proto(onnx.load_from_string(data.getvalue()))


def _torch(model: nn.Module, images: Tensor, path: Path, facts: str, options: Options) -> None:
    extra, data = {KEY: facts}, io.BytesIO()  # on a full disk torch would end the process
    if format_of(path) == "exported":
        # Core ML and others take programs without operators of training only
        program = _program(model, images, options).run_decompositions({})
        torch.export.save(program, data, extra_files=extra)
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


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, str, Options], None]] = {
    "onnx": _onnx,
    "torchscript": _torch,
    "exported": _torch,
    "openvino": _openvino,
    "litert": write_litert,
    "executorch": write_executorch,
    "ncnn": write_ncnn,
    "coreml": write_coreml,
}


def random_classifier(model: str, input_size: Size | None = None) -> Classifier:
    """Return a model with the random weights of `randomize`."""
    cfg = timm.get_pretrained_cfg(model)
    size = input_size or (as_size(cfg.input_size[1:]) if cfg else 224)
    network = randomize(timm.create_model(model).eval())
    return untrained_classifier(network, model, size)


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Set the parameters, in place, so that an error in any layer shows in the logits.

    With the initial weights of training the gates are so small that a network without its gnConvs
    has the same logits to 1e-6. Here each layer keeps the variance of its input.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("complex_weight"):
            mean, std = 0.0, 0.5**0.5  # of the real and the imaginary part
        elif parameter.ndim > 1:
            mean, std = 0.0, parameter[0].numel() ** -0.5
        elif "gamma" in name:
            mean, std = 0.5, 0.1
        else:  # of norms, and biases
            mean, std = float(name.endswith("weight")), 0.1
        parameter.normal_(mean, std, generator=generator)
    return network
