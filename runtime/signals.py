"""Signals that stop a run, in the main process and in loader workers."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

import torch
import torch.distributed as dist

from runtime.distributed import DistributedContext

# by rising precedence: when Slurm asks for a requeue (SIGUSR2) it sends SIGTERM, too
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


MOST_CALLS = 4
"""Steps without asking for signals: launchers kill processes 30 seconds after theirs."""


class Stopped(Exception):  # noqa: N818  (not an error)
    """A signal has stopped the run, which has saved its state, if it saves at all."""

    def __init__(self, number: int, saved: bool) -> None:
        what = "after saving; the same command resumes from there" if saved else "without saving"
        super().__init__(f"stopped by {signal.Signals(number).name} {what}")
        self.number = number
        self.status = 128 + number  # the exit status, as in shells


class Watch:
    """Decides, the same on all ranks, when to save by the clock and when to stop by a signal.

    The first signal stops the run after the current step; the same signal again, at least a second
    later, ends the process at once. `minutes` is the time between saves; 0 for none.
    """

    def __init__(self, context: DistributedContext, minutes: float = 0.0) -> None:
        self.context = context
        self.minutes = minutes
        self.saved_at = self.asked_at = time.monotonic()
        self.noted: dict[signal.Signals, float] = {}
        self.interval = self.calls_left = 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGNALS in the body; only the main thread can, others do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now, number = time.monotonic(), signal.Signals(number)
        # a terminal signals every process, and launchers forward their signal once more
        if number in self.noted and now - self.noted[number] >= 1:
            for child in multiprocessing.active_children():
                child.kill()  # loader workers ignore signals, and may be waiting for a file
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted.setdefault(number, now)

    def ask(self) -> tuple[bool, int]:
        """Return whether to save, and the signal that stops the run or 0; the same on all ranks.

        Asking the other ranks makes the fastest wait for the slowest, so that happens in some calls
        only: about once a second, but every MOST_CALLS at least. Rank 0 tells when the next is.
        """
        self.calls_left -= 1
        if self.calls_left > 0:
            return False, 0
        now = time.monotonic()
        calls_per_second = self.interval / max(now - self.asked_at, 1e-3)
        late = bool(self.minutes) and time.monotonic() - self.saved_at >= 60 * self.minutes
        first_place = max((SIGNALS.index(number) + 1 for number in self.noted), default=0)
        interval = min(max(1, int(calls_per_second)), MOST_CALLS)
        if not self.context.is_distributed:
            interval = 1
        is_main = self.context.is_main
        answer = torch.tensor([is_main and late, first_place, is_main * interval])
        if self.context.is_distributed:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.context.control)
        save, place, self.interval = answer.tolist()
        self.calls_left, self.asked_at = self.interval, now
        return bool(save), int(SIGNALS[place - 1]) if place else 0

    def saved(self) -> None:
        self.saved_at = time.monotonic()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start workers in the body with SIGNALS blocked, until they can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore SIGNALS: in a loader worker, which the last step needs, and when all is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@cache
def end_workers_at_exit() -> None:
    """At exit, kill the workers: Python would send SIGTERM, which they ignore, and wait."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
