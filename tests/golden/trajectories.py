"""Repeats recorded training runs with this project's engine and prints how far it strays.

python -m tests.golden.trajectories tests/golden/training_trajectories.json

A record gives the loss of every micro-batch, the schedules, and sum and 2-norm of some final
weights (and of their EMA). The weights come from `tests.golden.formula`; batch i of
epoch e from `RandomState(1000 e + i)`: images, then labels. The runs are repeated in float64 by
default, so that what is left is the rounding of the record: in float32 the sum of the classifier's
weights, whose gradients cancel over the classes, strays by 3e-6 to 1e-5 with the number of threads.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from config.command_line import parse_args
from config.flags import Config
from engine import train_one_epoch
from runtime.distributed import SINGLE_PROCESS
from runtime.sizes import sides
from tests.golden.formula import fill_by_formula
from training.build import TrainSetup, build_model, build_training
from training.state import TrainState

TOLERANCE = 1e-5


def repeat(record: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Runs one record again; the largest relative difference of each recorded quantity."""
    recorded = dict(record["config"])
    classes, steps = recorded.pop("num_classes"), recorded.pop("steps_per_epoch")
    config = _as_config(recorded)
    model = fill_by_formula(build_model(config.model, classes).to(dtype))
    models.accelerate(model)  # as main.py trains it
    images = steps * config.total_batch(processes=1)
    state, setup = build_training(config, model, images, classes, SINGLE_PROCESS)
    losses: list[float] = []

    def recording(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = setup.criterion(logits, target)
        losses.append(loss.item())
        return loss

    recorder = dataclasses.replace(setup, criterion=recording)
    for epoch in range(config.schedule.epochs):
        train_one_epoch(state, recorder, _batches(config, epoch, steps, classes, dtype))
        state.end_epoch()
    return _differences(record, state, setup, losses)


def _as_config(recorded: dict[str, Any]) -> Config:
    flags = [f"--{name}={_yaml(value)}" for name, value in recorded.items() if value is not None]
    if recorded.get("model_ema_decay") is not None:
        flags.append("--model_ema=true")
    return parse_args([*flags, "--mixup=0", "--cutmix=0", "--device=cpu"])


def _yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _batches(
    config: Config, epoch: int, steps: int, classes: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = []
    batch, size = config.data.batch_size, config.model.input_size
    for index in range(steps * config.optim.update_freq):
        random = np.random.RandomState(1000 * epoch + index)
        images = random.standard_normal((batch, 3, *sides(size))).astype(np.float32)
        labels = random.randint(0, classes, (batch,))
        batches.append((torch.from_numpy(images).to(dtype), torch.from_numpy(labels)))
    return batches


def _differences(
    record: dict[str, Any], state: TrainState, setup: TrainSetup, losses: list[float]
) -> dict[str, float]:
    steps = range(len(record["lr_schedule"]))
    differences = {
        "losses": _largest(losses, record["losses"]),
        "learning rate": _largest(
            [setup.schedule.learning_rate(step) for step in steps], record["lr_schedule"]
        ),
        "weight decay": _largest(
            [setup.schedule.decay(step) for step in steps], record["wd_schedule"]
        ),
        "final weights": _largest_of_sums(state.bare_model, record["final_sum_and_norm"]),
    }
    if record["ema_sum_and_norm"]:
        assert state.ema is not None
        differences["EMA"] = _largest_of_sums(state.ema.module, record["ema_sum_and_norm"])
    return differences


def _largest(ours: list[float], theirs: list[float]) -> float:
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values for {len(theirs)} recorded ones")
    scale = np.maximum(np.abs(theirs), 1e-12)
    return float(np.max(np.abs(np.array(ours) - np.array(theirs)) / scale))


def _largest_of_sums(model: torch.nn.Module, recorded: dict[str, list[float]]) -> float:
    """Differences of sum and 2-norm, relative to the 2-norm (a sum may be close to 0)."""
    state = model.state_dict()
    largest = 0.0
    for name, (total, norm) in recorded.items():
        weight = state[name].double()
        difference = max(abs(weight.sum().item() - total), abs(weight.norm().item() - norm))
        largest = max(largest, difference / norm)
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    args = parser.parse_args()
    records = json.loads(args.file.read_text())
    worst = 0.0
    for name, record in records.items():
        differences = repeat(record, getattr(torch, args.dtype))
        worst = max(worst, *differences.values())
        shown = "  ".join(f"{key} {value:.1e}" for key, value in differences.items())
        sys.stdout.write(f"{name}: {shown}\n")
    sys.stdout.write(f"largest difference: {worst:.1e} (tolerance {TOLERANCE:.0e})\n")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
