"""Measures speed and memory in comparison with peers.

python -m benchmarks                                   # everything
python -m benchmarks inference --models hornet_small_gf --batch-size 1 8 --input-size 224 256
python -m benchmarks training --peer other_hornet.py --device cuda --dtype bfloat16
python -m benchmarks --gpu --output report.md          # T, S, B within 8 minutes
python -m benchmarks exports --checkpoint runs/mine/checkpoint-best.pth

The networks are compared with a peer and with ConvNeXts of the same size; this needs torch, timm
and torchvision only. The modes loop, loader, predict, epochs, start and clouds need the packages
of main.py, exports those of pip install '.[export,openvino]'.
"""

import csv
import datetime
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import timm
import torch

import models  # noqa: F401 - registers the HorNets with timm
from benchmarks import networks
from benchmarks.measure import Row, machine
from benchmarks.networks import Setting
from benchmarks.peers import PLAIN, Peers, load_peer
from runtime.errors import Parser, UserError, near_names, program
from runtime.files import open_table

NETWORKS = ("inference", "training")
PIPELINE = ("loop", "loader", "predict", "epochs", "start", "clouds")
MODES = (*NETWORKS, *PIPELINE, "exports")
GPU_MODELS = [f"hornet_{s}_{kind}" for s in ("tiny", "small", "base") for kind in ("7x7", "gf")]
GPU_RUNS = [("training", 128), ("inference", 256), ("inference", 32), ("inference", 1)]
"""Mode and batch size."""


def parser() -> Parser:
    this = Parser("python -m benchmarks", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("modes", nargs="*", metavar="MODE", help=f"what to measure: {', '.join(MODES)} (all)")
    add("--gpu", action="store_true",
        help="training at batch 128 and inference at 256, 32 and 1, in bfloat16, also compiled; "
        f"by default of {', '.join(GPU_MODELS)}, within 8 minutes")  # fmt: skip
    add("--models", nargs="+", metavar="NAME", help=f"({' '.join(GPU_MODELS[:2])})")
    add("--batch-size", nargs="+", type=int, metavar="N", help="images (8)")
    add("--input-size", nargs="+", type=int, default=[224], metavar="PIXELS", help="side (224)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), help="(both)")
    add("--device", choices=("cpu", "cuda"), help="(cuda if there is a GPU)")
    add("--threads", type=int, default=1, metavar="N", help="of the CPU (1)")
    add("--rounds", type=int, default=7, metavar="N", help="timed runs of each contender (7)")
    add("--compile", action="store_true", help="inference also compiled, with frozen weights")
    add("--minutes", type=float, metavar="M", help="skip what might end later; the report lists it")
    add("--peer", type=Path, default=PLAIN, metavar="FILE.py",
        help="file that registers hornet_* with timm (benchmarks/plain_hornet.py)")  # fmt: skip
    add("--checkpoint", metavar="FILE",
        help="for exports: also a trained model, compared with itself")  # fmt: skip
    add("--calibration", type=Path, metavar="FOLDER",
        help="images for its int8 file (random photographs)")  # fmt: skip
    add("--output", type=Path, metavar="FILE.md", help="also write the report there")
    add("--results-file", type=Path, metavar="FILE.csv",
        help="add rows of inference there, in the columns of timm's benchmark-infer-*.csv: "
        "images/s, ms, GMACs, millions of parameters and activations")  # fmt: skip
    return this


def measure(arguments: Namespace, peers: Peers) -> Iterator[Row]:
    modes = [mode for mode in NETWORKS if mode in arguments.modes]
    runs = GPU_RUNS if arguments.gpu else [(m, b) for b in arguments.batch_size for m in modes]
    sizes, dtypes, device = arguments.input_size, arguments.dtype, arguments.device
    start, longest = time.monotonic(), 0.0
    for model, size, dtype, (mode, batch) in product(peers, sizes, dtypes, runs):
        setting = Setting(model, peers[model], batch, size, dtype, device, arguments.rounds)
        begun = time.monotonic()
        if arguments.minutes and begun - start + longest > 60 * arguments.minutes:
            yield Row(setting.name, mode, None, "no time was left")
            continue
        torch.compiler.reset()  # otherwise it stops compiling after a few networks
        for row in getattr(networks, mode)(setting, arguments.compile):
            if arguments.results_file and row.what == "inference, as built":
                _add_result(arguments.results_file, setting.result(row.seconds))
            yield row
        longest = max(longest, time.monotonic() - begun)
    # imported late: they need more packages than the rest
    if "exports" in arguments.modes:
        from benchmarks.exports import exports

        yield from exports(peers, arguments)
    for mode in PIPELINE:
        if mode in arguments.modes:
            from benchmarks import clouds, epochs, pipeline, waits

            home = {"epochs": epochs, "clouds": clouds, "start": waits}.get(mode, pipeline)
            yield from getattr(home, mode)(arguments.rounds, device)


def _add_result(path: Path, result: dict[str, str]) -> None:
    with open_table(path, [*result], "--results-file") as file:
        csv.DictWriter(file, [*result], lineterminator="\n").writerow(result)


def _peers(arguments: Namespace) -> Peers:
    peers, known = load_peer(arguments.peer), timm.list_models("hornet_*")
    names = arguments.models or (GPU_MODELS if arguments.gpu else GPU_MODELS[:2])
    for model in names:
        if model not in known:
            raise UserError(f"--models {model} is not a HorNet{near_names(model, known)}")
        if model not in peers:
            raise UserError(f"--peer {arguments.peer} has no {model}; it has {', '.join(peers)}")
    return {model: peers[model] for model in names}


def _complete(arguments: Namespace) -> None:
    """Set defaults that depend on other flags; UserError for flags that cannot work."""
    if unknown := set(arguments.modes) - set(MODES):
        raise UserError(f"there is no mode {min(unknown)}; choose from {', '.join(MODES)}")
    device = "cuda" if arguments.gpu or torch.cuda.is_available() else "cpu"
    arguments.device = arguments.device or device
    if arguments.gpu:
        fixed = {"modes": arguments.modes, "--batch-size": arguments.batch_size,
                 "--dtype": arguments.dtype}  # fmt: skip
        for name, given in fixed.items():
            if given:
                raise UserError(f"--gpu determines what is measured: leave out {name}")
        arguments.dtype, arguments.compile = ["bfloat16"], True
        arguments.minutes = 8.0 if arguments.minutes is None else arguments.minutes
    elif not arguments.modes:
        arguments.modes = [m for m in MODES if m != "exports" or arguments.device == "cpu"]
    if "exports" in arguments.modes and arguments.device != "cpu":
        raise UserError("exports are measured on the CPU: give --device cpu")
    if arguments.checkpoint and "exports" not in arguments.modes:
        raise UserError("--checkpoint is for exports, on the CPU")
    if arguments.calibration and not arguments.checkpoint:
        raise UserError("--calibration is for the int8 file of --checkpoint")
    arguments.batch_size = arguments.batch_size or [8]
    arguments.dtype = arguments.dtype or ["float32", "bfloat16"]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    if min(arguments.rounds, arguments.threads, *arguments.batch_size) < 1:
        raise UserError("--rounds, --threads and --batch-size have to be 1 or more")
    if arguments.threads > 1024:
        raise UserError(f"--threads {arguments.threads}: at most 1024")
    if min(arguments.input_size) < 32:
        raise UserError("--input-size has to be 32 or more")
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        raise UserError(f"--minutes {arguments.minutes}: give a number above 0")
    files = {"--output": arguments.output, "--results-file": arguments.results_file}
    for flag, path in files.items():
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{flag} {path} cannot be a file: give FILE in a folder")
    if arguments.results_file and (
        "inference" not in arguments.modes and not arguments.gpu or len(arguments.dtype) > 1
    ):
        raise UserError("--results-file needs the mode inference, and one --dtype")


@program(parser)
def main(arguments: Namespace) -> None:
    """Print each row as it comes, then the report, which --output gets, too."""
    _complete(arguments)
    arguments.device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    peers = _peers(arguments)
    facts = machine(arguments.device) | networks.matrix_rates(arguments.device, arguments.rounds)
    rows: list[Row] = []
    try:
        for row in measure(arguments, peers):
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
