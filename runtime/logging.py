"""Logging, throughput, reading log.txt and timing.txt."""

import json
import logging
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from runtime.distributed import DistributedContext
from runtime.errors import print_any_name

logger = logging.getLogger(__name__)

TIMING_FILE = "timing.txt"
"""In the folder of a run: speed and hardware of each epoch. They are not in log.txt, since equal
runs have equal logs."""


def setup_logging(context: DistributedContext) -> None:
    """Log to standard output: everything of rank 0, warnings of the others."""
    print_any_name()
    logging.basicConfig(
        level=logging.INFO if context.is_main else logging.WARNING,
        format="%(asctime)s %(message)s" if context.is_main else f"rank {context.rank} %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    logging.raiseExceptions = False  # no traceback when the reader of a pipe has ended (`| head`)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


class Throughput:
    """Images per second, share of time spent waiting for data, and time left, per log line."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.images = 0
        self.steps = 0
        self.waited = 0.0

    def summary(self, steps_left: int, world_size: int) -> str:
        seconds = max(time.perf_counter() - self.start, 1e-9)
        left = int(seconds / max(1, self.steps) * steps_left)
        return (
            f"{self.images * world_size / seconds:.0f} images/s  "
            f"data {100 * self.waited / seconds:.0f}%  "
            f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )


class EpochTimer:
    """Times each epoch; of an epoch that a resumed run continues, the rest, without a speed."""

    def __init__(self, context: DistributedContext) -> None:
        self.hardware = {"device": device_name(context.device), "processes": context.world_size}

    def start(self, position: int) -> None:
        """Start an epoch at `position`: the images used before, on all ranks together."""
        self.started, self.position = time.perf_counter(), position

    def end_training(self, position: int) -> None:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        self.images_per_s = (position - self.position) / seconds

    def record(self, epoch: int) -> dict[str, Any]:
        """Return the record of timing.txt: `seconds` so far, and the speed of the training."""
        seconds = round(time.perf_counter() - self.started, 3)
        # a stream reads again what it has used before, so only whole epochs tell the speed
        speed = {} if self.position else {"train_images_per_s": round(self.images_per_s, 2)}
        return {"epoch": epoch, "seconds": seconds} | speed | self.hardware


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU as far as it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not on Linux, or closed to users
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def read_log(output_dir: Path, name: str = "log.txt") -> list[dict[str, Any]]:
    """Return the records of log.txt, or another file, by epoch; the last of a repeated epoch."""
    records = {}
    for line in (output_dir / name).read_text().splitlines():
        try:
            record = json.loads(line)
            records[int(record["epoch"])] = record
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            logger.warning("%s/%s: skipped an incomplete line", output_dir, name)
    return [records[epoch] for epoch in sorted(records)]
