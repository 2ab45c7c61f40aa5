"""Signals that ask a run to stop, and the moments at which it saves."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from runtime.distributed import DistributedContext

# the later ones go before the earlier ones: Slurm sends SIGTERM too where it asks for a requeue
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):  # noqa: N818  (it is no error)
    """The run was told to stop, and has saved what it had, if it saves at all.

    `number` is that of the signal.
    """

    def __init__(self, number: int, saved: bool) -> None:
        what = "after saving; the same command goes on from there" if saved else "without saving"
        super().__init__(f"stopped by {signal.Signals(number).name} {what}")
        self.number = number

    @property
    def status(self) -> int:
        """The status of the process: 128 and the signal's number, as shells have it."""
        return 128 + self.number


class Watch:
    """Notes signals and the time, and tells all processes alike when to save and when to stop.

    The first signal asks for the end of the running step; a second of its kind, a second or more
    later, ends the process at once.

    Args:
        minutes: Time from one save to the next; 0 for none by time.
    """

    def __init__(self, context: DistributedContext, minutes: float = 0.0) -> None:
        self.context = context
        self.minutes = minutes
        self.saved_at = time.monotonic()
        self.noted: dict[signal.Signals, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGNALS in the body, if this is the main thread: no other one can."""
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
        # launchers pass on what a terminal has sent to everyone already
        if number in self.noted and now - self.noted[number] >= 1:
            for child in multiprocessing.active_children():
                child.kill()  # loader processes ignore signals, and one may wait for a file
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted.setdefault(number, now)

    def ask(self) -> tuple[bool, int]:
        """Whether it is time to save, and the signal to stop by (0 for none), alike everywhere."""
        late = bool(self.minutes) and time.monotonic() - self.saved_at >= 60 * self.minutes
        first_place = max((SIGNALS.index(number) + 1 for number in self.noted), default=0)
        answer = torch.tensor([int(self.context.is_main and late), first_place])
        if self.context.is_distributed:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.context.control)
        save, place = answer.tolist()
        return bool(save), int(SIGNALS[place - 1]) if place else 0

    def saved(self) -> None:
        self.saved_at = time.monotonic()
