"""Exports in formats of phones and small devices: LiteRT, ExecuTorch, ncnn, Core ML.

The input is float32 (B, 3, S, S), preprocessed. The metadata of a file is beside it, in JSON, under
its name with the suffix .json; Core ML has it inside.
"""

import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from inference.exported import KEY, facts_file
from inference.targets import Options
from runtime.errors import UserError


def write_litert(
    model: nn.Module, images: Tensor, path: Path, facts: str, options: Options
) -> None:
    import litert_torch

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

    if options.batch_size != 1:
        raise UserError("ncnn takes one image at a time: leave out --batch-size")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        traced = Path(folder) / "traced.pt"
        torch.jit.trace(model, (images,), check_trace=False).save(traced)
        shape = ",".join(map(str, images.shape))
        command = [
            pnnx.EXEC_PATH, traced, f"inputshape=[{shape}]", f"ncnnparam={path.absolute()}",
            f"ncnnbin={path.with_suffix('.bin').absolute()}",
            f"fp16={int(options.dtype == 'float16')}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        *_, last = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise UserError(f"pnnx ended with {done.returncode}: {last}")
    facts_file(path).write_text(facts)


def write_coreml(
    model: nn.Module, images: Tensor, path: Path, facts: str, options: Options
) -> None:
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
    converted.save(str(path))
