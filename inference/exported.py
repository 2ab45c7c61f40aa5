"""Exported classifiers: one file with the network, its classes and its preprocessing.

Shapes: images (B, 3, S, S) float32 -> logits (B, classes) float32, in every format.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript", "exported": ".pt2", "openvino": ".xml"}
KEY = "hornet"  # metadata key of the facts, as JSON


@dataclass(frozen=True)
class Facts:
    """The metadata of an exported file."""

    model: str
    classes: list[str]
    input_size: int
    mean: list[float]
    std: list[float]
    crop_pct: float | None
    dtype: str
    batch_size: int | None  # images per run; None for any number
    any_size: bool = False  # whether images may have any height and width
    exif_orientation: bool = True
    background: str | None = "white"

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
        decoding = Decoding(bool(self.exif_orientation), self.background)
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
        self.path, open_file = path, _OPENERS[format_of(path)]
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        try:
            with quiet_library(str(path)):
                run, text = open_file(path, threads)
            if not text:
                raise ValueError("it does not say what it is")
            self.facts = Facts(**json.loads(text))
            self.preprocessing = self.facts.preprocessing()
        except UserError:
            raise
        except Exception as error:  # each library has its own types
            raise UserError(f"{path} is not a file of tools.export: {reason_of(error)}") from None
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
            parts.append(logits[: len(part)])
        return torch.cat(parts)


@contextmanager
def quiet_library(user: str) -> Iterator[None]:
    """Hide a library's log and warnings; if it is missing, say how to install it for its user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise MissingPackageError(
            f"{user} needs a package ({reason_of(error)}): pip install '.[export]', for OpenVINO "
            "'.[openvino]'"
        ) from None
    finally:
        logging.disable(level)


def format_of(path: Path) -> str:
    """Return the format of a file, by its suffix; UserError for another suffix."""
    for kind, suffix in FORMATS.items():
        if path.suffix == suffix:
            return kind
    raise UserError(f"{path}: the suffix is one of {', '.join(FORMATS.values())}")


def _onnx(path: Path, threads: int) -> tuple[Any, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
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


_OPENERS = dict(onnx=_onnx, torchscript=_torch, exported=_torch, openvino=_openvino)
