"""The waits before the first step of a run, on 200,000 images, and of each later epoch.

Each contender runs in a process of its own: python -m benchmarks.waits (ours|peer) FOLDER EPOCHS
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Row

IMAGES, CLASSES, WORKERS, BATCH, SIZE, STEPS = 200_000, 1000, 4, 8, 32, 12
MODEL = "hornet_atto_7x7"
ROOT = Path(__file__).parents[1]


class EnoughError(Exception):
    """Ends a run."""


def start(rounds: int, _: torch.device) -> Iterator[Row]:
    """Compare with torchvision's ImageFolder and a new DataLoader per epoch."""
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        _write(large, IMAGES, CLASSES)
        _write(small, STEPS * BATCH, 2)
        for case, data, epochs in (
            (f"start to the first step, {IMAGES:,} images", large, 1),
            ("end of an epoch, saved, to the next step", small, 6),
        ):
            seconds: dict[str, list[float]] = {"peer": [], "ours": []}
            for _round in range(rounds):
                for contender, values in seconds.items():
                    command = [sys.executable, "-m", __name__, contender, str(data), str(epochs)]
                    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
                    values.append(json.loads(done.stdout.splitlines()[-1]))
            own, peer = median(seconds["ours"]), median(seconds["peer"])
            detail = f"{own:.2f} s, peer {peer:.2f} s, n = {rounds}"
            yield Row(f"{WORKERS} workers", case, peer / own, detail)


def _write(folder: Path, images: int, classes: int) -> None:
    """Write class folders with links to a few files."""
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    for label in range(classes):
        (folder / f"{label:04d}").mkdir()
        file = folder / f"{label:04d}" / "0.jpg"
        Image.fromarray(pixels).save(file)
        for index in range(1, images // classes):
            os.link(file, file.with_name(f"{index}.jpg"))


def main(contender: str, folder: str, epochs: str) -> None:
    """Print the seconds from the start of this process to the first step.

    Of several epochs, print the median of the seconds from their ends until the next steps begin.
    """
    began = time.time() - _age()
    steps = (_our_steps if contender == "ours" else _peer_steps)(folder, int(epochs))
    if epochs == "1":
        seconds = next(steps) - began
    else:
        times = [*steps]
        between = [later - earlier for earlier, later in pairwise(times)]
        # the first epoch also starts what lives through all of them
        gaps = between[2 * STEPS - 1 :: STEPS]
        seconds = median(gaps) - median(between[1 : STEPS - 1])
    sys.stdout.write(f"\n{json.dumps(seconds)}\n")


def _age() -> float:
    """Return the seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def _our_steps(folder: str, epochs: int) -> Iterator[float]:
    import engine
    import main
    from config.command_line import parse_args

    times: list[float] = []
    take_step = engine.train_step

    def timed(*arguments: Any) -> None:
        take_step(*arguments)
        times.append(time.time())
        if epochs == 1:
            raise EnoughError

    engine.train_step = timed  # type: ignore[assignment]
    flags = {"data_set": "image_folder", "data_path": folder, "model": MODEL, "input_size": SIZE,
             "batch_size": BATCH, "num_workers": WORKERS, "epochs": epochs, "warmup_epochs": 0,
             "disable_eval": True, "output_dir": f"{folder}/../run", "auto_resume": False,
             "device": "cpu"}  # fmt: skip
    config = parse_args(
        [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    )
    with suppress(EnoughError):
        main.run(config)
    yield from times


def _peer_steps(folder: str, epochs: int) -> Iterator[float]:
    import timm
    from timm.data import create_transform
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    import models  # noqa: F401 - registers the network

    images = ImageFolder(folder, create_transform(SIZE, is_training=True, auto_augment=None))
    network = timm.create_model(MODEL, num_classes=len(images.classes))
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(epochs):
        loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)
        for inputs, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
            yield time.time()
        torch.save((network.state_dict(), optimizer.state_dict()), f"{folder}/../peer.pth")


if __name__ == "__main__":
    main(*sys.argv[1:])
