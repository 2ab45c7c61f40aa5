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
from torch import Tensor, nn

from inference.preprocessing import Preprocessing
from runtime.errors import MissingPackageError, UserError, reason_of

FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript", "exported": ".pt2", "openvino": ".xml"}
KEY = "hornet"
"""Metadata key of the facts, as JSON."""


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
    batch_size: int | None
    """Images per run; None for any number."""
    any_size: bool = False
    """Whether images may have any height and width."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing; TypeError or ValueError if any of the facts is invalid."""
        if not all(isinstance(name, str) for name in (self.model, self.dtype, *self.classes)):
            raise TypeError("its model, type or classes are not names")
        size = 1 if self.batch_size is None else self.batch_size
        if type(size) is not int or size < 1:
            raise ValueError(f"its batch size is {size!r}")
        mean, std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        return Preprocessing(self.input_size, mean, std, self.crop_pct)


class Exported(nn.Module):
    """An exported network, run by the library of its format on the CPU.

    Files of torch.export and TorchScript are programs: load only those from people you trust.

    Args:
        path: The file.
        threads: CPU threads; 0 for the library's default.

    Raises:
        UserError: the file is missing, damaged, or not written by tools.export, or the library is
            not installed.
    """

    run: Callable[[Tensor], Tensor]

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()
        open_file = _OPENERS[format_of(path)]
        self.path = path
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
            if logits.shape[1:] != (len(self.facts.classes),):
                raise UserError(
                    f"{self.path} names {len(self.facts.classes)} classes, it has others"
                )
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


def _open_onnx(path: Path, threads: int) -> tuple[Any, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)

    return run, session.get_modelmeta().custom_metadata_map.get(KEY, "")


def _open_torchscript(path: Path, _: int) -> tuple[Any, str]:
    extra = {KEY: ""}
    module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    return module, extra[KEY]


def _open_exported(path: Path, _: int) -> tuple[Any, str]:
    extra = {KEY: ""}
    program = torch.export.load(str(path), extra_files=extra)
    return program.module(), extra[KEY]


def _open_openvino(path: Path, threads: int) -> tuple[Any, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([KEY]).astype(str)
    hint = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[json.loads(text)["dtype"]]
    options = {"INFERENCE_PRECISION_HINT": hint}
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    compiled = core.compile_model(model, "CPU", options)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.array(compiled(images.numpy())[0]))

    return run, text


_OPENERS = {
    "onnx": _open_onnx,
    "torchscript": _open_torchscript,
    "exported": _open_exported,
    "openvino": _open_openvino,
}
