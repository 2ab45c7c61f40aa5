"""Kills training runs at random moments until they are done; their results have to be the same.

python -m tests.faults --kills 50

Runs of one and of two processes, with every source of random numbers and loader processes, save
after each step. SIGKILL ends all processes of a run at once, wherever they are: starting, in a
step, in an evaluation, while a checkpoint is written. The same command goes on, until as many kills
are done; then weights, EMAs, optimizers and log.txt are compared bit for bit with those
of an undisturbed run. Ends with status 1 where anything differs.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from checkpoints.reading import damage_of
from checkpoints.run_folder import resumable
from input_pipeline.digits import write_digits

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("--model", "hornet_atto_7x7", "--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
    *("--data_set", "digits", "--max_images", "120", "--input_size", "32", "--device", "cpu"),
    *("--epochs", "10", "--warmup_epochs", "0", "--lr", "1e-3", "--layer_scale_init_value", "0.5"),
    *("--drop_path", "0.3", "--mixup", "0.8", "--cutmix", "1", "--aa", "rand-m9-mstd0.5-inc1"),
    *("--reprob", "0.5", "--model_ema", "true", "--model_ema_eval", "true"),
    *("--model_ema_decay", "0.9", "--log_interval", "1", "--save_ckpt_steps", "1"),
    *("--num_workers", "1"),
]


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults")
    parser.add_argument("--kills", type=int, default=50, help="how many (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    kills: Counter[tuple[int, str]] = Counter()
    runs: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "digits"
        write_digits(data)
        for processes in (1, 2):
            run(processes, data, Path(name) / f"undisturbed-{processes}")
        while sum(kills.values()) < arguments.kills:
            processes = 1 + sum(runs.values()) % 2
            folder = Path(name) / f"killed-{sum(runs.values())}"
            for _ in range(5):
                starting = moments.random() < 0.1
                where = run(processes, data, folder, moments.uniform(0, 4), starting)
                if not where:
                    break  # it came to its end before
                kills[processes, where] += 1
                damaged = [path.name for path in resumable(folder) if damage_of(path)]
                if damaged:
                    return say(f"damaged by a kill: {', '.join(damaged)}")
            run(processes, data, folder)
            difference = differs(folder, Path(name) / f"undisturbed-{processes}")
            if difference:
                return say(f"{folder.name} differs from the undisturbed run: {difference}")
            runs[processes] += 1
            say(f"{sum(kills.values())} kills in {sum(runs.values())} runs, all equal so far")
    say(f"{sum(kills.values())} kills in {sum(runs.values())} runs, all equal bit for bit:")
    say("| processes | killed during | kills |\n| --- | --- | --- |")
    for (processes, where), count in sorted(kills.items()):
        say(f"| {processes} | {where} | {count} |")
    return 0


def run(
    processes: int,
    data: Path,
    folder: Path,
    kill_after: float | None = None,
    starting: bool = False,
) -> str:
    """One start of the run; where it was when it was killed, '' if it came to its end.

    It is killed so many seconds after its training begins, or, `starting`, after its start.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "main.py", *FLAGS]
    command += ["--batch_size", str(12 // processes), "--data_path", str(data)]
    log = folder.with_suffix(".txt")
    unfinished = set(folder.glob(".*.tmp"))
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--output_dir", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        while kill_after is not None and not starting and process.poll() is None:
            if "GFLOPs" in log.read_text():
                break
            time.sleep(0.02)
        try:
            status = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):  # a loader process that has just ended
                    member.kill()
            psutil.wait_procs(family)
            is_saving = bool(set(folder.glob(".*.tmp")) - unfinished)
            return "saving" if is_saving else place(log.read_text())
    if status:
        raise RuntimeError(f"the run failed with status {status}:\n{log.read_text()[-3000:]}")
    return ""


def place(log: str) -> str:
    """Where a run was, by its log."""
    lines = re.findall(r"^\d\d:\d\d:\d\d (epoch|test|resumed|trained)", log, re.MULTILINE)
    if not lines or lines[-1] == "resumed":
        return "starting"
    last_step = re.findall(r"step (\d+)/(\d+)", log)[-1:]
    ended = bool(last_step) and last_step[0][0] == last_step[0][1]
    return "evaluation" if lines[-1] == "test" or ended else "training"


def differs(left: Path, right: Path) -> str:
    """What is not the same in two folders of finished runs."""
    if (left / "log.txt").read_text() != (right / "log.txt").read_text():
        return "log.txt"
    for name in ("checkpoint-9.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (left, right))
        for part in ("model", "model_ema", "optimizer", "meters", "epoch", "step", "max_accuracy"):
            try:
                torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)
            except AssertionError:
                return f"{part} of {name}"
    return ""


def say(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main())
