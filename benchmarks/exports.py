"""Exported files compared with eager PyTorch: speed and largest error."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

import models
from benchmarks.measure import Row, paired, speed
from benchmarks.networks import Setting
from benchmarks.peers import Peers
from benchmarks.pipeline import CPU, write_photos
from inference import export
from inference.classifier import Classifier, load_classifier, untrained_classifier
from inference.exported import FORMATS, Exported
from inference.targets import Options
from runtime.errors import UserError
from runtime.sizes import sides

WAYS = (
    ("onnx", "float32"),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("torchscript", "float32"),
    ("exported", "float32"),
    ("litert", "float32"),
    ("executorch", "float32"),
    ("ncnn", "float32"),
)


def exports(peers: Peers, arguments: Namespace) -> Iterator[Row]:
    """Measure the models, and a checkpoint, which is its own peer in PyTorch.

    The int8 file of the checkpoint is calibrated with --calibration; without it, and for the
    models, with random photographs.
    """
    checkpoint, batches, rounds = arguments.checkpoint, arguments.batch_size, arguments.rounds
    trained = load_classifier(checkpoint, takes_exported=False) if checkpoint else None
    for model, size, batch in product(peers, arguments.input_size, batches):
        ours, theirs = Setting(model, peers[model], batch, size, "float32", CPU, rounds).pair()
        ours = models.accelerate(export.randomize(ours.eval()))
        classifier = untrained_classifier(ours, model, size)
        yield from _exported(model, classifier, theirs.eval(), batch, rounds, None)
    if trained:
        name = f"{trained.config.model} in {Path(checkpoint).name}"
        for batch in batches:
            yield from _exported(name, trained, trained.model, batch, rounds, arguments.calibration)


def _exported(
    name: str, ours: Classifier, peer: nn.Module, batch: int, rounds: int, calibration: Path | None
) -> Iterator[Row]:
    size = ours.preprocessing.input_size
    images = torch.randn(batch, 3, *sides(size))
    contenders = {"peer": peer, "PyTorch": ours.model}
    notes = {}
    with tempfile.TemporaryDirectory() as folder:
        if calibration is None:
            calibration = Path(folder) / "photos"
            write_photos(calibration, 16)
        for kind, dtype in WAYS:
            what = f"{kind} {dtype}"
            output = Path(folder) / f"{dtype}{FORMATS[kind]}"
            options = Options(dtype, batch)
            try:
                if dtype == "int8":
                    quality = export.export_int8(ours, output, options, calibration)
                    notes[what] = f"largest error {quality.error:.1e}"
                    if quality.before is not None:
                        notes[what] += f"; accuracy {quality.before:.2%}, then {quality.after:.2%}"
                else:
                    errors = export.export(ours, output, options)
                    notes[what] = f"largest error {max(errors.values()):.1e}"
            except UserError as error:  # a missing package, or one that takes one image at a time
                yield Row(name, what, None, str(error))
                continue
            contenders[what] = Exported(output, torch.get_num_threads())
        runs = {what: partial(model, images) for what, model in contenders.items()}
        with torch.no_grad():
            timings = paired(runs, rounds, CPU, warm_up=2)
    for what, note in notes.items():
        ratio, details = speed(timings[what], timings["peer"])
        own, _ = speed(timings[what], timings["PyTorch"])
        details = f"{note}; {own:.2f} times our own in PyTorch; {details}"
        yield Row(f"{name}, batch {batch} at {size}", what, ratio, details)
