"""What a run saves: checkpoints after and inside epochs, log.txt, and a report where it fails."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from checkpoints.run_folder import RunFolder
from config import Config
from input_pipeline.loaders import TrainLoader
from runtime.distributed import DistributedContext, barrier
from runtime.errors import UserError
from runtime.signals import Stopped, Watch
from training.nonfinite import NonFiniteError
from training.state import TrainState

logger = logging.getLogger(__name__)


class Saver:
    """Writes the state of a run into its folder.

    Args:
        state: What is saved.
        folder: Where it is saved.
        config: When it is saved; each checkpoint holds the flags.
        classes: The names of the classes, which each checkpoint holds, too.
        context: This process among the ranks.
    """

    def __init__(
        self,
        state: TrainState,
        folder: RunFolder,
        config: Config,
        classes: list[str],
        context: DistributedContext,
    ) -> None:
        self.state, self.folder, self.config, self.context = state, folder, config, context
        self.extras = {"args": config.flat(), "classes": classes}
        self.watch = Watch(context, config.checkpoint.save_ckpt_minutes)
        self.saved_step = state.progress.step

    def begin(self, resume_from: str) -> None:
        """Notes the flags, moves aside what came after `resume_from`, and saves the start."""
        self.folder.begin(self.config)
        self.folder.set_aside(resume_from, self.state.progress.epoch)
        if self.state.progress.step == 0:
            self.folder.save(self._checkpoint(), "start")

    def listening(self) -> AbstractContextManager[None]:
        """Signals are recorded in the body, and obeyed by `save_or_stop`."""
        return self.watch.listening()

    def save_or_stop(self) -> None:
        """Inside an epoch: saves if --save_ckpt_steps, --save_ckpt_minutes or a signal ask for it.

        On all ranks alike. Raises Stopped after a signal.
        """
        progress, every = self.state.progress, self.config.checkpoint.save_ckpt_steps
        save, number = self.watch.ask()
        is_due = save or every and progress.step % every == 0 and progress.step != self.saved_step
        # don't replace good checkpoints after non-finite steps
        if number or is_due and not self.state.nonfinite.in_a_row:
            self.folder.save_step(self._checkpoint(), progress.epoch + 1, progress.step)
            self.saved_step = progress.step
            self.watch.saved()
        if number:
            barrier()  # launchers kill all ranks when one exits: wait for rank 0 to save
            has_saved = bool(self.config.checkpoint.output_dir) and self.config.checkpoint.save_ckpt
            raise Stopped(number, has_saved)

    def end_epoch(self, record: dict[str, Any], best: list[str]) -> None:
        """After an epoch: its record in log.txt, the checkpoints `best`, and the numbered one."""
        epoch = self.state.progress.epoch
        self.folder.log(record)
        checkpoint = self._checkpoint()
        for name in best:
            self.folder.save(checkpoint, name)
        is_last = epoch + 1 == self.config.schedule.epochs
        self.folder.save_epoch(checkpoint, epoch, is_last)

    def _checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds now; every rank has to call it."""
        return self.state.state_dict(self.context) | self.extras

    @contextmanager
    def reporting(self, loader: TrainLoader, total_batch: int) -> Iterator[None]:
        """Too many non-finite steps in the body leave bad_step.json, with the last one's images."""
        try:
            yield
        except NonFiniteError as error:
            progress = self.state.progress
            since = progress.step - error.report["step"]
            images = loader.names_of_step(total_batch, progress.position, since)
            path = self.folder.report(error.report | {"images": images})
            raise UserError(f"{error}; more of it is in {path}" if path else str(error)) from None
