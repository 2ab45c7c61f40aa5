"""The start of an epoch, and the memory of a loader worker, at 200,000 images.

Each contender runs in a process of its own: python -m benchmarks.epochs (ours|peer) METHOD
"""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row
from config.flags import DataConfig
from input_pipeline.image_sets import ListedImages
from input_pipeline.listing import Listing
from input_pipeline.loaders import TrainLoader
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import SINGLE_PROCESS

IMAGES, WORKERS, BATCH, EPOCHS = 200_000, 4, 500, 5
ROOT = Path(__file__).parents[1]


class OurPaths(ListedImages):
    """Reads the paths of images, but no images."""

    def read(self, index: int) -> tuple[Any, int]:
        return torch.tensor([len(self.name(index))]), int(self.source.labels[index])


class PeerPaths(Dataset):
    """The same from a list of tuples, as torchvision's ImageFolder has it."""

    def __init__(self) -> None:
        self.samples = [(f"/data/{path}", label) for label, path in _images()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return torch.tensor([len(path)]), label


def epochs(_: int, __: torch.device) -> Iterator[Row]:
    """Compare with a new DataLoader per epoch, under both start methods of worker processes.

    `fork` is the default before Python 3.14, `forkserver` from then on.
    """
    for method in ("fork", "forkserver"):
        case = f"{IMAGES:,} images, {WORKERS} workers, {method}"
        measured = []
        for contender in ("ours", "peer"):
            command = [sys.executable, "-m", "benchmarks.epochs", contender, method]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            measured.append(json.loads(done.stdout))
        (own, own_memory), (peer, peer_memory) = measured
        # the first epoch starts our workers
        later, theirs = median(own[1:]), median(peer)
        details = f"{later:.2f} s, the first {own[0]:.2f} s, peer {theirs:.2f} s"
        yield Row(case, "start of an epoch", theirs / later, details)
        details = f"{own_memory:.0f} MB of its own, peer {peer_memory:.0f} MB"
        yield Row(case, "memory of a worker, share", own_memory / peer_memory, details)


def main(contender: str, method: str) -> None:
    """Print the seconds until the first batch of each epoch, and the private MB of a worker."""
    multiprocessing.set_start_method(method)
    start: Callable[[int], Iterator[Any]]
    if contender == "ours":
        classes = [f"n{label:08d}" for label in range(IMAGES // 100)]
        images = OurPaths(Listing.of("/data", classes, _images(), {}), _same)
        config = DataConfig(batch_size=BATCH, num_workers=WORKERS, pin_mem=False)
        ours = TrainLoader(images, config, SINGLE_PROCESS, UnreadableImages(Path("bad.txt"), 0))
        start = partial(ours.batches, position=0)
    else:
        data = PeerPaths()

        def start(_: int) -> Iterator[Any]:
            return iter(DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS))

    seconds, megabytes = [], 0.0
    for epoch in range(EPOCHS):
        since = time.perf_counter()
        batches = start(epoch)
        next(batches)
        seconds.append(time.perf_counter() - since)
        for number, _ in enumerate(batches, start=2):
            if number == IMAGES // BATCH - 4:  # the workers are still there
                workers = multiprocessing.active_children()
                megabytes = median(_private_megabytes(process.pid) for process in workers)
    sys.stdout.write(json.dumps((seconds, megabytes)))


def _images() -> Iterator[tuple[int, str]]:
    return ((i // 100, f"n{i // 100:08d}/n{i // 100:08d}_{i:06d}.JPEG") for i in range(IMAGES))


def _same(image: Any) -> Any:
    return image


def _private_megabytes(pid: int | None) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"Private_\w+:\s+(\d+) kB", text))) / 1e3


if __name__ == "__main__":
    main(*sys.argv[1:])
