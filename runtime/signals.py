"""Signals that ask a run to stop, what loader workers do about them, and when a run saves."""

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

# the later ones go before the earlier ones: Slurm sends SIGTERM too where it asks for a requeue
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):  # noqa: N818  (it is no error)
    """The run was told to stop by a signal, and has saved its state, if it saves at all."""

    def __init__(self, number: int, saved: bool) -> None:
        what = "after saving; the same command resumes from there" if saved else "without saving"
        super().__init__(f"stopped by {signal.Signals(number).name} {what}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status of the process: 128 plus the signal's number, as in shells."""
        return 128 + self.number


class Watch:
    """Records signals and the time, and says on all ranks alike when to save and when to stop.

    The first signal asks for a stop at the end of the step; a second of the same kind, a second or
    more later, ends the process at once.

    Args:
        context: This process among the ranks.
        minutes: Time from one save to the next; 0 for none by time.
    """

    def __init__(self, context: DistributedContext, minutes: float = 0.0) -> None:
        self.context = context
        self.minutes = minutes
        self.saved_at = time.monotonic()
        self.noted: dict[signal.Signals, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGNALS in the body, if this is the main thread: other threads can't."""
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
        # launchers forward signals that a terminal has sent to every process already
        if number in self.noted and now - self.noted[number] >= 1:
            for child in multiprocessing.active_children():
                child.kill()  # loader workers ignore signals, and one may wait for a file
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted.setdefault(number, now)

    def ask(self) -> tuple[bool, int]:
        """Whether it is time to save, and the signal to stop by or 0; on all ranks alike."""
        late = bool(self.minutes) and time.monotonic() - self.saved_at >= 60 * self.minutes
        first_place = max((SIGNALS.index(number) + 1 for number in self.noted), default=0)
        answer = torch.tensor([int(self.context.is_main and late), first_place])
        if self.context.is_distributed:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.context.control)
        save, place = answer.tolist()
        return bool(save), int(SIGNALS[place - 1]) if place else 0

    def saved(self) -> None:
        self.saved_at = time.monotonic()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Workers that are started in the body begin with SIGNALS blocked, so that none of them is
    ended before it can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals_in_worker(_: int) -> None:
    """Keeps a loader worker alive where its whole group is told to stop: the last step needs it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@cache
def end_workers_at_exit() -> None:
    """Python ends its workers at exit by SIGTERM, which they ignore, and would wait for them."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
