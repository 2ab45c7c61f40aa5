"""Measures the speed and memory of the models and of a training's parts, against peers.

python -m benchmarks                                   # everything
python -m benchmarks inference --models hornet_small_gf --batch-size 1 8 --input-size 224 256
python -m benchmarks training --peer other_hornet.py --device cuda --dtype bfloat16
python -m benchmarks --gpu --output report.md          # T, S, B within 8 minutes
python -m benchmarks exports --checkpoint runs/mine/checkpoint-best.pth

It needs torch, timm and torchvision only; ConvNeXts of the same size are timed beside the models.
loop and loader need what main.py needs, exports their libraries: pip install '.[export,openvino]'.
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
from benchmarks import networks
from benchmarks.measure import Row, machine
from benchmarks.networks import Setting
from benchmarks.peers import PLAIN, load_peer
from runtime.errors import UserError, near_names, run_program

LARGEST_THREADS = 1024
NETWORKS = ("inference", "training")
MODES = (*NETWORKS, "loop", "loader", "start", "exports")
GPU_MODELS = [f"hornet_{s}_{kind}" for s in ("tiny", "small", "base") for kind in ("7x7", "gf")]


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Speed and memory against peers, interleaved in one process.",
    )
    add = this.add_argument
    add("modes", nargs="*", metavar="MODE", help=f"what to measure: {', '.join(MODES)} (all)")
    add("--gpu", action="store_true",
        help="training at batch 128, inference at 256, 32 and 1, bfloat16, compiled too, of "
        f"{', '.join(GPU_MODELS)}, within 8 minutes if not given")  # fmt: skip
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
    add("--output", type=Path, metavar="FILE.md", help="where the report goes, too")
    return this


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of the report, as they are measured."""
    device, rounds = torch.device(arguments.device), arguments.rounds
    modes = [] if arguments.gpu else arguments.modes or MODES
    if device.type != "cpu" and not arguments.modes:
        modes = [mode for mode in modes if mode != "exports"]
    start, longest = time.monotonic(), 0.0
    for mode, setting in settings(arguments, device):
        begun = time.monotonic()
        if arguments.minutes and begun - start + longest > 60 * arguments.minutes:
            yield Row(setting.name, mode, None, "no time was left")
            continue
        torch.compiler.reset()  # which gives up after some networks, and runs them as they are
        yield from getattr(networks, mode)(setting, arguments.compile)
        longest = max(longest, time.monotonic() - begun)
    # imported late: they need more packages than the rest
    if "exports" in modes:
        from benchmarks.exports import exports

        peers = peers_of(arguments)
        yield from exports(peers, arguments.input_size, arguments.batch_size, rounds,
                           arguments.checkpoint, arguments.calibration)  # fmt: skip
    if {"loop", "loader", "start"} & set(modes):
        from benchmarks import pipeline

        if "loop" in modes:
            yield pipeline.loop("hornet_large_7x7", rounds, device)
        if "loader" in modes:
            yield from pipeline.loader(rounds)
        if "start" in modes:
            yield pipeline.start(rounds)


def settings(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Setting]]:
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
        kind = getattr(torch, dtype)
        yield mode, Setting(model, peers[model], batch, size, kind, device, arguments.rounds)


def peers_of(arguments: argparse.Namespace) -> dict[str, Callable[..., nn.Module]]:
    """The peer of each model that is measured."""
    peers, known = load_peer(arguments.peer), timm.list_models("hornet_*")
    names = arguments.models or (GPU_MODELS if arguments.gpu else GPU_MODELS[:2])
    for model in names:
        if model not in known:
            raise UserError(f"--models {model} is no HorNet{near_names(model, known)}")
        if model not in peers:
            raise UserError(f"--peer {arguments.peer} has no {model}; it has {', '.join(peers)}")
    return {model: peers[model] for model in names}


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("benchmarks", lambda: _main(arguments))


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
    if arguments.threads > LARGEST_THREADS:
        raise UserError(f"--threads {arguments.threads}: at most {LARGEST_THREADS}")
    if min(arguments.input_size) < 32:
        raise UserError("--input-size has to be 32 or more")
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        raise UserError(f"--minutes {arguments.minutes}: give a number above 0")
    if arguments.output and (arguments.output.is_dir() or not arguments.output.parent.is_dir()):
        raise UserError(f"--output {arguments.output} cannot be a file: give FILE in a folder")


def report(arguments: argparse.Namespace) -> None:
    """Prints the rows as they come, then all of it as a table, which goes to a file, too."""
    device = torch.device(arguments.device)
    facts = machine(device) | networks.matrix_rates(device, arguments.rounds)
    rows: list[Row] = []
    try:
        for row in measure(arguments):
            rows.append(row)
            sys.stderr.write(f"{row}\n")
    finally:  # what was measured before an error is not lost
        if rows:
            text = f"# Benchmark of {datetime.date.today()}\n\n"
            text += "".join(f"- {name}: {value}\n" for name, value in facts.items())
            text += f"- peer: {arguments.peer.name}, in the same process, interleaved\n"
            text += "\nTimes as fast as the peer; of memory, and where it says so, a share.\n"
            text += "\n| case | what | ratio | median |\n" + 4 * "| --- " + "|\n"
            text += "".join(f"{row}\n" for row in rows)
            sys.stdout.write(text)
            if arguments.output:
                arguments.output.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
