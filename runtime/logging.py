"""Logging, throughput, and reading log.txt."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from runtime.distributed import DistributedContext
from runtime.errors import print_any_name

logger = logging.getLogger(__name__)


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


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Return the records of log.txt by epoch; the last one of a repeated epoch."""
    records = {}
    for line in (output_dir / "log.txt").read_text().splitlines():
        try:
            record = json.loads(line)
            records[int(record["epoch"])] = record
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            logger.warning("%s/log.txt: skipped an incomplete line", output_dir)
    return [records[epoch] for epoch in sorted(records)]
