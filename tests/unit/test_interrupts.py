"""Signals: the first asks, the second ends."""

import signal
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

SCRIPT = """
import os, signal, sys, time, torch
from runtime.distributed import DistributedContext
from runtime.interrupts import Watch
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
