"""Measures the speed and memory of the models and of a training's parts, against peers.

python -m tools.benchmark                              # everything, against the targets
python -m tools.benchmark inference --models hornet_small_gf --batch-size 1 8 --input-size 224 256
python -m tools.benchmark training --peer other_hornet.py --device cuda --dtype bfloat16
python -m tools.benchmark --gpu --output report.md     # T, S, B within 8 minutes
python -m tools.benchmark exports --checkpoint runs/mine/checkpoint-best.pth

It needs torch, timm and torchvision only; ConvNeXts of the same size are timed beside the models.
Exports need their libraries: pip install '.[export,openvino]'.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import timm
import torch
from torch import nn

import models  # noqa: F401 - registers the HorNets with timm
from benchmarks import cases
from benchmarks.cases import Row, Setting
from benchmarks.measure import machine
from benchmarks.peers import PLAIN, load_peer
from runtime.errors import UserError, near_names, run_program

MOST_THREADS = 1024
NETWORKS = ("inference", "training")
MODES = (*NETWORKS, "loop", "loader", "start", "exports")
TRAINING = {
    "training": 1.7,
    "lean": 1.25,
    "saved for backward": 0.85,
    "saved for backward, lean": 0.46,
}
# against benchmarks/plain_peer.py on a CPU, batch 8 at 224
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("7x7", "float32"): {"as built": 1.9, "folded": 2.2, **TRAINING},
    ("gf", "float32"): {"as built": 1.6, "folded": 2.2, **TRAINING},
    ("7x7", "bfloat16"): {"as built": 1.4, "compiled": 1.8, "training": 1.4},
    ("gf", "bfloat16"): {"as built": 1.4, "compiled": 1.8, "training": 1.6},
}


EXPORT_TARGETS = {
    "7x7": {"onnx float32": 2.2, "openvino bfloat16": 4.0},
    "gf": {"onnx float32": 2.2, "openvino bfloat16": 2.8},
}

GPU_MODELS = [
    f"hornet_{size}_{kind}" for size in ("tiny", "small", "base") for kind in ("7x7", "gf")
]


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.benchmark",
        description="Speed and memory against peers, interleaved in one process.",
    )
    add = this.add_argument
    add("modes", nargs="*", metavar="MODE", help=f"what to measure: {', '.join(MODES)} (all)")
    add("--gpu", action="store_true",
        help="training at batch 128, inference at 256, 32 and 1, bfloat16, compiled too, of "
        f"{', '.join(GPU_MODELS)}, within 8 minutes if not said otherwise")  # fmt: skip
    add("--models", nargs="+", metavar="NAME", help=f"({' '.join(GPU_MODELS[:2])})")
    add("--batch-size", nargs="+", type=int, metavar="N", help="images (8)")
    add("--input-size", nargs="+", type=int, default=[224], metavar="PIXELS", help="side (224)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), help="(both)")
    add("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    add("--threads", type=int, default=1, metavar="N", help="of a CPU (1)")
    add("--rounds", type=int, default=7, metavar="N", help="how often each is timed (7)")
    add("--compile", action="store_true", help="inference also compiled, with frozen weights")
    add("--minutes", type=float, metavar="M",
        help="begin nothing that might not end by then; what is left out is named")  # fmt: skip
    add("--peer", type=Path, default=PLAIN, metavar="FILE.py",
        help="file that registers hornet_* models (benchmarks/plain_peer.py)")  # fmt: skip
    add("--checkpoint", metavar="FILE", help="exports: a trained model too, against itself")
    add("--calibration", type=Path, metavar="FOLDER",
        help="images for its int8 file (random photographs)")  # fmt: skip
    add("--output", type=Path, metavar="FILE.md", help="where the report goes too")
    return this


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of the report, as they are measured."""
    device, rounds = torch.device(arguments.device), arguments.rounds
    modes = [] if arguments.gpu else arguments.modes or MODES
    if device.type != "cpu" and not arguments.modes:
        modes = [mode for mode in modes if mode != "exports"]
    has_targets = device.type == "cpu" and arguments.peer == PLAIN
    start, longest = time.monotonic(), 0.0
    for mode, setting in networks(arguments, device, has_targets):
        begun = time.monotonic()
        if arguments.minutes and begun - start + longest > 60 * arguments.minutes:
            yield Row(setting.name, mode, None, "no time was left")
            continue
        torch.compiler.reset()  # which gives up after some networks, and runs them as they are
        yield from getattr(cases, mode)(setting, arguments.compile)
        longest = max(longest, time.monotonic() - begun)
    if "exports" in modes:
        yield from exports(arguments, device, has_targets)
    if "loop" in modes:
        yield from cases.loop("hornet_large_7x7", rounds, device, 0.25 if has_targets else None)
    if "loader" in modes:
        yield from cases.loader(rounds, {"same pixels": 1.2, "--fast_decode": 1.5})
    if "start" in modes:
        yield from cases.start(rounds, 1.0)


def networks(
    arguments: argparse.Namespace, device: torch.device, has_targets: bool
) -> Iterator[tuple[str, Setting]]:
    """What is measured of which network: 'inference' or 'training'."""
    if arguments.gpu:
        runs = [("training", 128), ("inference", 256), ("inference", 32), ("inference", 1)]
    else:
        modes = [mode for mode in NETWORKS if mode in (arguments.modes or MODES)]
        runs = [(mode, batch) for batch in arguments.batch_size for mode in modes]
    if not runs:
        return
    peers = peers_of(arguments)
    choices = product(peers, arguments.input_size, arguments.dtype, runs)
    for model, size, dtype, (mode, batch) in choices:
        usual = has_targets and (size, batch) == (224, 8)
        targets = TARGETS[variant(model), dtype] if usual else {}
        kind = getattr(torch, dtype)
        rounds = arguments.rounds
        yield mode, Setting(model, peers[model], batch, size, kind, device, rounds, targets)


def peers_of(arguments: argparse.Namespace) -> dict[str, Callable[..., nn.Module]]:
    """The peer of each model that is measured."""
    peers = load_peer(arguments.peer)
    names = arguments.models or (GPU_MODELS if arguments.gpu else GPU_MODELS[:2])
    for model in names:
        if model not in timm.list_models("hornet_*"):
            known = timm.list_models("hornet_*")
            raise UserError(f"--models {model} is no HorNet{near_names(model, known)}")
        if model not in peers:
            raise UserError(f"--peer {arguments.peer} has no {model}; it has {', '.join(peers)}")
    return {model: peers[model] for model in names}


def variant(model: str) -> str:
    return "gf" if "_gf" in model else "7x7"


def exports(
    arguments: argparse.Namespace, device: torch.device, has_targets: bool
) -> Iterator[Row]:
    """Exported files of the models, and of --checkpoint, whose peer is itself in PyTorch."""
    # imported late: they need more packages than the rest
    from benchmarks.exports import exported
    from tools.classifier import load_classifier, untrained_classifier

    rounds = arguments.rounds
    trained = (
        load_classifier(arguments.checkpoint, takes_exported=False)
        if arguments.checkpoint
        else None
    )
    peers = peers_of(arguments)
    for model, size, batch in product(peers, arguments.input_size, arguments.batch_size):
        usual = has_targets and (size, batch) == (224, 8)
        targets = EXPORT_TARGETS[variant(model)] if usual else {}
        ours, theirs = Setting(model, peers[model], batch, size, torch.float32, device, 0).pair()
        classifier = untrained_classifier(ours.eval(), model, size)
        yield from exported(model, classifier, theirs.eval(), batch, rounds, targets)
    if trained:
        name = f"{trained.config.model} in {Path(arguments.checkpoint).name}"
        for batch in arguments.batch_size:
            yield from exported(
                name, trained, trained.model, batch, rounds, {}, arguments.calibration
            )


def line(row: Row) -> str:
    sign = "at most" if row.lower_is_better else "at least"
    target = "" if row.target is None else f"{sign} {row.target:g}"
    verdict = "" if row.target is None else ("yes" if row.reached else "**no**")
    ratio = "not measured" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {row.case} | {row.what} | {ratio} | {target} | {verdict} | {row.detail} |"


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.benchmark", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    complete(arguments)
    torch.set_num_threads(arguments.threads)
    report(arguments)
    return 0


def complete(arguments: argparse.Namespace) -> None:
    """Checks what was given, and adds what was not."""
    unknown = set(arguments.modes) - set(MODES)
    if unknown:
        raise UserError(f"there is no mode {min(unknown)}; choose of {', '.join(MODES)}")
    if arguments.gpu:
        fixed = {"modes": arguments.modes, "--batch-size": arguments.batch_size,
                 "--dtype": arguments.dtype}  # fmt: skip
        for name, given in fixed.items():
            if given:
                raise UserError(f"--gpu says what is measured: leave out {name}")
        arguments.dtype, arguments.compile = ["bfloat16"], True
        arguments.minutes = 8.0 if arguments.minutes is None else arguments.minutes
        arguments.device = arguments.device or "cuda"
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "exports" in arguments.modes and arguments.device != "cpu":
        raise UserError("exports are measured on a CPU: give --device cpu")
    exports_too = not arguments.gpu and "exports" in (arguments.modes or MODES)
    if arguments.checkpoint and not (exports_too and arguments.device == "cpu"):
        raise UserError("--checkpoint is for exports, on a CPU")
    if arguments.calibration and not arguments.checkpoint:
        raise UserError("--calibration is for the int8 file of --checkpoint")
    arguments.batch_size = arguments.batch_size or [8]
    arguments.dtype = arguments.dtype or ["float32", "bfloat16"]
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {arguments.device}: this machine offers no GPU")
    if min(arguments.rounds, arguments.threads, *arguments.batch_size) < 1:
        raise UserError("--rounds, --threads and --batch-size have to be 1 or more")
    if arguments.threads > MOST_THREADS:
        raise UserError(f"--threads {arguments.threads}: at most {MOST_THREADS}")
    if min(arguments.input_size) < 32:
        raise UserError("--input-size has to be 32 or more")
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        raise UserError(f"--minutes {arguments.minutes}: give a number above 0")
    if arguments.output and (arguments.output.is_dir() or not arguments.output.parent.is_dir()):
        raise UserError(f"--output {arguments.output} cannot be a file: give FILE in a folder")


def report(arguments: argparse.Namespace) -> None:
    """Prints the rows as they come, then all of it as a table, which goes to a file too."""
    device = torch.device(arguments.device)
    facts = machine(device) | cases.matrix_rates(device, arguments.rounds)
    rows: list[Row] = []
    try:
        for row in measure(arguments):
            rows.append(row)
            sys.stderr.write(line(row) + "\n")
    finally:  # what was measured before an error is not lost
        if rows:
            write(rows, facts, arguments)


def write(rows: list[Row], facts: dict[str, str], arguments: argparse.Namespace) -> None:
    text = f"# Benchmark of {datetime.date.today()}\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in facts.items())
    text += f"- peer: {arguments.peer.name}, in the same process, interleaved\n"
    text += "\nTimes as fast as the peer (memory, and where it says so: share of the peer's).\n"
    text += "\n| case | what | ratio | target | reached | median |\n" + 6 * "| --- " + "|\n"
    text += "".join(f"{line(row)}\n" for row in rows)
    sys.stdout.write(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
