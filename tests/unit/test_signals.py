"""Signals: the first asks, the second ends."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import TensorDataset
from torch.utils.data._utils import signal_handling

from config.flags import DataConfig
from input_pipeline.image_sets import ImageSet
from input_pipeline.loaders import _loader
from runtime.distributed import SINGLE_PROCESS
from runtime.signals import SIGNALS
from tests.integration.conftest import ROOT

SCRIPT = """
import os, signal, sys, time, torch
from runtime.distributed import DistributedContext
from runtime.signals import Watch
watch = Watch(DistributedContext(0, 0, 1, torch.device("cpu")))
with watch.listening():
    for pause in map(float, sys.argv[1:]):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
    print(watch.ask())
"""


@pytest.mark.parametrize(("pauses", "status"), [(["0"], 0), (["0", "0"], 0), (["1.2", "5"], -15)])
def test_the_second_signal_a_second_later_ends_the_process(pauses, status):
    command = [sys.executable, "-c", SCRIPT, *pauses]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("" if status else f"(False, {int(signal.SIGTERM)})\n")


def test_a_signal_to_a_worker_that_starts(monkeypatch):
    """Slurm tells all processes of a job to stop, those too that have just begun."""
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the patch does not reach workers that are not forked")
    torch_installs = signal_handling._set_worker_signal_handlers

    def install_and_be_told():
        torch_installs()
        for number in SIGNALS:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", install_and_be_told)
    config = DataConfig(num_workers=2, pin_mem=False)
    images, source = ImageSet([], None, []), TensorDataset(torch.arange(8))
    loader = _loader(images, source, config, SINGLE_PROCESS, batch_size=2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert sorted(value for (batch,) in loader for value in batch.tolist()) == list(range(8))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
