"""Exported classifiers: one file with the network, its classes and its preprocessing.

Shapes: images (B, 3, H, W) float32 -> logits (B, classes) float32, in every format.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor, nn

from inference.preprocessing import Preprocessing
from input_pipeline.images import Decoding
from runtime.errors import MissingPackageError, UserError, reason_of

FORMATS = {
    "onnx": ".onnx",
    "torchscript": ".torchscript",
    "exported": ".pt2",
    "openvino": ".xml",
    "litert": ".tflite",
    "executorch": ".pte",
    "ncnn": ".ncnn.param",  # and .ncnn.bin: FILE.bin is OpenVINO's
    "coreml": ".mlpackage",
}
KEY = "hornet"  # metadata key of the facts, as JSON
_EXTRAS = {"onnx": "export", "openvino": "export,openvino"}  # else the name of the format


@dataclass(frozen=True)
class Facts:
    """The metadata of an exported file."""

    model: str
    classes: list[str]
    input_size: Any  # side of a square, or height and width
    mean: list[float]
    std: list[float]
    crop_pct: float | None
    dtype: str
    batch_size: int | None  # images per run; None for any number
    any_size: bool = False  # whether images may have any height and width
    exif_orientation: bool = True
    background: str | None = "white"
    multi_label: bool = False  # whether probabilities are the sigmoid of the logits
    channels: int = 3
    # pixel values that become 0 and 1; None for those of 8 or 16 bits
    value_range: list[float] | None = None

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing; TypeError or ValueError if any of the facts is invalid."""
        if not all(isinstance(name, str) for name in (self.model, self.dtype, *self.classes)):
            raise TypeError("its model, type or classes are not names")
        size = 1 if self.batch_size is None else self.batch_size
        if type(size) is not int or size < 1:
            raise ValueError(f"its batch size is {size!r}")
        if max(self.mean) > 9:
            raise ValueError(f"its mean is {self.mean}")
        span = None if self.value_range is None else (self.value_range[0], self.value_range[1])
        decoding = Decoding(bool(self.exif_orientation), self.background, self.channels, span)
        if self.background is not None:
            ImageColor.getrgb(self.background)
        mean, std = tuple(self.mean), tuple(self.std)
        return Preprocessing(self.input_size, mean, std, self.crop_pct, decoding)


class Exported(nn.Module):
    """An exported network, run by the library of its format on the CPU.

    Files of torch.export and TorchScript are programs: load only those from people you trust.

    `threads` are CPU threads; 0 for the library's default. Raises UserError if the file is missing,
    damaged, or not written by tools.export, or the library is not installed.
    """

    run: Callable[[Tensor], Tensor]

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()
        self.path, kind = path, format_of(path)
        if kind not in _OPENERS:
            raise UserError(f"{path}: this project runs no Core ML files; Xcode does")
        for file in (path, *companions(path)):
            if not file.is_file():
                needs = f"{path} needs it" if file != path else "give a file of tools.export"
                raise UserError(f"there is no file {file}: {needs}")
        try:
            with quiet_library(str(path), kind):
                run, text = _OPENERS[kind](path, threads)
            if not text:
                raise ValueError("it does not say what it is")
            self.facts = Facts(**json.loads(text))
            self.preprocessing = self.facts.preprocessing()
        except UserError:
            raise
        except Exception as error:  # each library has its own types
            raise UserError(
                f"{path} is damaged, or not a file of tools.export: {reason_of(error)}"
            ) from None
        object.__setattr__(self, "run", run)  # no submodule: a program refuses eval()

    def forward(self, images: Tensor) -> Tensor:
        """Take any number of images; if the file has a fixed batch size, several runs."""
        size = self.facts.batch_size or len(images)
        parts = []
        for part in images.cpu().split(size):
            missing = part.new_zeros(size - len(part), *part.shape[1:])
            try:
                logits = self.run(torch.cat((part, missing)))
            except Exception as error:  # each library has its own types
                shape = " x ".join(map(str, part.shape))
                raise UserError(f"{self.path} fails on {shape}: {reason_of(error)}") from None
            count = len(self.facts.classes)
            if logits.shape[1:] != (count,):
                raise UserError(f"{self.path} names {count} classes, it has others")
            if not logits.isfinite().all():
                raise UserError(f"{self.path} gives numbers that are not finite")
            parts.append(logits[: len(part)])
        return torch.cat(parts)


@contextmanager
def quiet_library(user: str, kind: str) -> Iterator[None]:
    """Hide what the library of a format prints; if it is missing, say how to install it.

    `user` needs the library, in messages. C++ libraries print to the process's files 1 and 2.
    """
    level, kept = logging.root.manager.disable, []
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            warnings.simplefilter("ignore")
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor in (1, 2):
                kept.append(os.dup(descriptor))
                os.dup2(nowhere.fileno(), descriptor)
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    except ImportError as error:
        extra = _EXTRAS.get(kind, kind)
        raise MissingPackageError(
            f"{user} needs a package ({reason_of(error)}): pip install '.[{extra}]'"
        ) from None
    finally:
        for descriptor, copied in zip((1, 2), kept, strict=False):
            os.dup2(copied, descriptor)
            os.close(copied)
        logging.disable(level)


def facts_file(path: Path) -> Path:
    """Return the file of the metadata of a format that has no place for it."""
    return path.with_name(f"{path.name}.json")


def companions(path: Path) -> list[Path]:
    """Return the files beside an exported one that belong to it."""
    kind = format_of(path)
    weights = [path.with_suffix(".bin")] if kind in ("openvino", "ncnn") else []
    return weights + ([facts_file(path)] if kind in ("litert", "executorch", "ncnn") else [])


def format_of(path: Path) -> str:
    """Return the format of a file, by its suffix; UserError for another suffix."""
    for kind, suffix in FORMATS.items():
        if path.name.endswith(suffix):
            return kind
    raise UserError(f"{path}: the suffix is one of {', '.join(FORMATS.values())}")


def _onnx(path: Path, threads: int) -> tuple[Any, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised, too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)

    return run, session.get_modelmeta().custom_metadata_map.get(KEY, "")


def _torch(path: Path, _: int) -> tuple[Any, str]:
    extra = {KEY: ""}
    if format_of(path) == "exported":
        return torch.export.load(str(path), extra_files=extra).module(), extra[KEY]
    return torch.jit.load(str(path), map_location="cpu", _extra_files=extra), extra[KEY]


def _openvino(path: Path, threads: int) -> tuple[Any, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([KEY]).astype(str)
    hint = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[json.loads(text)["dtype"]]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": str(threads)}
    compiled = core.compile_model(model, "CPU", options)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.array(compiled(images.numpy())[0]))

    return run, text


def _litert(path: Path, threads: int) -> tuple[Any, str]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads or None)
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner()

    def run(images: Tensor) -> Tensor:
        (logits,) = signature(images=images.numpy()).values()
        return torch.from_numpy(logits)

    return run, facts_file(path).read_text()


def _executorch(path: Path, threads: int) -> tuple[Any, str]:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads:
        portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        (logits,) = method.execute([images.contiguous()])
        return logits.clone()

    return run, facts_file(path).read_text()


def _ncnn(path: Path, threads: int) -> tuple[Any, str]:
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = threads or torch.get_num_threads()
    network.opt.use_fp16_packed = network.opt.use_fp16_storage = False
    network.opt.use_fp16_arithmetic = network.opt.use_bf16_storage = False
    if network.load_param(str(path)) or network.load_model(str(path.with_suffix(".bin"))):
        raise ValueError("ncnn cannot read it")

    def run(images: Tensor) -> Tensor:
        extractor = network.create_extractor()
        extractor.input("in0", ncnn.Mat(images[0].numpy()).clone())
        status, logits = extractor.extract("out0")
        if status:
            raise ValueError(f"ncnn's extract gives {status}")
        return torch.from_numpy(np.array(logits))[None]

    return run, facts_file(path).read_text()


_OPENERS = {
    "onnx": _onnx,
    "torchscript": _torch,
    "exported": _torch,
    "openvino": _openvino,
    "litert": _litert,
    "executorch": _executorch,
    "ncnn": _ncnn,
}
"""Core ML has none."""
