"""Exports in formats of phones and small devices: LiteRT, ExecuTorch, ncnn, Core ML.

Each function writes `path` for images (B, 3, S, S) in float32, preprocessed, and gives logits (B,
classes). It raises the library's errors, UserError or OSError. The metadata of a file is beside it,
in JSON, under its name with the suffix .json; Core ML has it inside.
"""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from inference.exported import KEY, facts_file
from inference.targets import Options
from runtime.errors import UserError, reason_of


def write_litert(
    model: nn.Module, images: Tensor, path: Path, facts: str, options: Options
) -> None:
    """Write a file whose default signature has the input `images`."""
    import litert_torch

    # without space the converter ends the process
    needed = 3 * sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        raise UserError(
            f"LiteRT's converter needs {needed / 1e6:.0f} MB in {tempfile.gettempdir()}: make "
            "room, or set TMPDIR"
        )
    litert_torch.convert(model, sample_kwargs={"images": images}).export(str(path))
    facts_file(path).write_text(facts)


def write_executorch(
    model: nn.Module, images: Tensor, path: Path, facts: str, options: Options
) -> None:
    """For CPUs of phones, through XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, (images,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    facts_file(path).write_text(facts)


def write_ncnn(model: nn.Module, images: Tensor, path: Path, facts: str, options: Options) -> None:
    """Layers in `path`, weights beside it with the suffix .bin; in float16, weights only."""
    import pnnx

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad():
        traced, data = Path(folder) / "traced.pt", io.BytesIO()
        torch.jit.save(torch.jit.trace(model, (images,), check_trace=False), data)
        traced.write_bytes(data.getvalue())  # on a full disk torch would end the process
        shape = ",".join(map(str, images.shape))
        command = [
            pnnx.EXEC_PATH, traced, f"inputshape=[{shape}]", f"ncnnparam={path.absolute()}",
            f"ncnnbin={path.with_suffix('.bin').absolute()}",
            f"fp16={int(options.dtype == 'float16')}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"pnnx does not start: {error}; install it again") from None
    if done.returncode:
        *_, last = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise UserError(f"pnnx ended with {done.returncode}: {last}")
    facts_file(path).write_text(facts)


def write_coreml(
    model: nn.Module, images: Tensor, path: Path, facts: str, options: Options
) -> None:
    """Write a program for iOS 16, macOS 13 and later."""
    import coremltools

    program = torch.export.export(model, (images,)).run_decompositions({})
    precision = coremltools.precision.FLOAT32
    if options.dtype == "float16":
        precision = coremltools.precision.FLOAT16
    converted = coremltools.convert(
        program,
        outputs=[coremltools.TensorType(name="logits")],
        compute_precision=precision,
        minimum_deployment_target=coremltools.target.iOS16,
    )
    converted.user_defined_metadata[KEY] = facts
    try:
        converted.save(str(path))
    except Exception as error:  # its own types on a full disk
        raise OSError(reason_of(error, 80)) from None
