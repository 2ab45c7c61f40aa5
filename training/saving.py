"""When a run saves: checkpoints after and inside epochs, log.txt, and a report on failure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from checkpoints.fitting import leave_out
from checkpoints.run_folder import RunFolder
from input_pipeline.loaders import TrainLoader
from runtime.distributed import barrier
from runtime.errors import UserError
from runtime.signals import Stopped, Watch
from training.build import TrainSetup
from training.nonfinite import NonFiniteError
from training.state import TrainState

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Saves the state of a run, with its flags and class names, into the run's folder."""

    state: TrainState
    setup: TrainSetup
    folder: RunFolder
    classes: list[str]
    wandb_id: str = ""

    def __post_init__(self) -> None:
        self.watch = Watch(self.setup.context, self.folder.config.save_ckpt_minutes)
        self.saved_step = self.state.progress.step

    def begin(self, resume_from: str) -> bool:
        """Save the flags, move aside what came after `resume_from`, and save a new run's start.

        Returns whether checkpoints were moved aside.
        """
        if not self.folder.config.output_dir:
            logger.info("nothing is saved: there is no --output_dir")
        self.folder.begin(self.setup.config)
        went_back = self.folder.set_aside(resume_from, self.state.progress.epoch)
        if self.state.progress.step == 0:
            self.folder.save(self._checkpoint(), "start")
        return went_back

    def save_or_stop(self) -> None:
        """Save, if --save_ckpt_steps, --save_ckpt_minutes or a signal ask for it.

        All ranks have to call it. Raises Stopped if some rank has received a signal.
        """
        progress, every = self.state.progress, self.folder.config.save_ckpt_steps
        save, number = self.watch.ask()
        is_due = save or every and progress.step % every == 0 and progress.step != self.saved_step
        # don't replace good checkpoints after non-finite steps
        if number or is_due and not self.state.nonfinite.in_a_row:
            self.folder.save_step(self._checkpoint(), progress.epoch + 1, progress.step)
            self.saved_step = progress.step
            self.watch.saved()
        if number:
            barrier()  # launchers kill all ranks when one exits: wait for rank 0 to save
            flags = self.folder.config
            raise Stopped(number, saved=bool(flags.output_dir) and flags.save_ckpt)

    def end_epoch(self, record: dict[str, Any], best: list[str]) -> None:
        """Write an epoch's record to log.txt, the checkpoints `best`, and the numbered one."""
        self.folder.log(record)
        epoch, checkpoint = self.state.progress.epoch, self._checkpoint()
        for name in best:
            self.folder.save(checkpoint, name)
        self.folder.save_epoch(checkpoint, epoch, epoch + 1 == self.setup.config.schedule.epochs)

    def _checkpoint(self) -> dict[str, Any]:
        """Return the content of a checkpoint; all ranks have to call it."""
        extras: dict[str, Any] = {"args": self.setup.config.flat(), "classes": self.classes}
        if self.wandb_id:
            extras["wandb_id"] = self.wandb_id
        saved = self.state.state_dict(self.setup.context) | extras
        if self.folder.config.save_frozen:
            return saved
        parameters = self.state.bare_model.named_parameters()
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        return leave_out(saved, self.setup.start_weights & frozen)

    @contextmanager
    def reporting(self, loader: TrainLoader) -> Iterator[None]:
        """After too many non-finite steps in the body, write bad_step.json."""
        try:
            yield
        except NonFiniteError as error:
            progress = self.state.progress
            since = progress.step - error.report["step"]
            images = loader.names_of_step(self.setup.total_batch, progress.position, since)
            path = self.folder.report(error.report | {"images": images})
            raise UserError(f"{error}; see {path}" if path else str(error)) from None
