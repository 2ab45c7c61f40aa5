"""Exported classifiers: one file with the network, its classes, and how images become its input.

Shapes: images (B, 3, S, S) float32 -> logits (B, classes) float32, in every format.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import UserError, reason_of

FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript", "exported": ".pt2", "openvino": ".xml"}
KEY = "hornet"
"""Under which a file has its facts, as JSON."""


@dataclass(frozen=True)
class Facts:
    """What an exported file says of itself."""

    model: str
    classes: list[str]
    input_size: int
    mean: list[float]
    std: list[float]
    crop_pct: float | None
    dtype: str
    batch_size: int | None
    """Images at a time; None for any number."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))


class Exported(nn.Module):
    """An exported network, run by the library of its format on the CPU.

    Args:
        path: The file.
        threads: Of the CPU; the library's own choice if 0.

    Raises:
        UserError: the file is missing, damaged, or none that tools.export has written, or the
            library is not installed.
    """

    facts: Facts
    run: Callable[[Tensor], Tensor]

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()
        kind = format_of(path)
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        try:
            run, text = _OPENERS[kind](path, threads)
            self.facts = Facts(**json.loads(text))
        except ImportError as error:
            raise UserError(
                f"{path} needs {error.name}: pip install '.[export]' (OpenVINO: '.[openvino]')"
            ) from None
        except Exception as error:  # each library has its own types
            raise UserError(
                f"{path} is no file that tools.export has written: {reason_of(error)}"
            ) from None
        # no submodule: a program refuses eval()
        object.__setattr__(self, "run", run)

    def forward(self, images: Tensor) -> Tensor:
        """Any number of images, in as many runs as the file's batch size asks for."""
        size = self.facts.batch_size or len(images)
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size].cpu()
            missing = part.new_zeros(size - len(part), *part.shape[1:])
            parts.append(self.run(torch.cat((part, missing)))[: len(part)])
        return torch.cat(parts)


def format_of(path: Path) -> str:
    """The format of a file, by its suffix; raises UserError for another."""
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

    return run, session.get_modelmeta().custom_metadata_map[KEY]


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
