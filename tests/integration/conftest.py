"""Three classes of digits, flags for a small network, and main.py as a user starts it."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from input_pipeline.digits import write_digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """train/ with 24 images and val/ with 11 of each of three digits."""
    root = tmp_path_factory.mktemp("data")
    write_digits(root / "all")
    for part, count in (("train", 24), ("val", 11)):
        for label in "037":
            (root / "three" / part / label).mkdir(parents=True)
            for path in sorted((root / "all" / part / label).iterdir())[:count]:
                shutil.copy(path, root / "three" / part / label)
    return root / "three"


@pytest.fixture(scope="session")
def flags(digits):
    return [
        *("--model", "hornet_atto_7x7"),
        *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
        *("--data_set", "image_folder", "--data_path", str(digits)),
        *("--input_size", "32", "--num_workers", "0", "--device", "cpu"),
        *("--batch_size", "8", "--epochs", "2", "--warmup_epochs", "0", "--lr", "1e-3"),
        *("--layer_scale_init_value", "0.5"),
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*command, **environment):
    """Runs python with that command line in a process of its own, as a user would."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )
