"""Metrics to TensorBoard and Weights & Biases: one curve, however often a run is stopped."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.errors import UserError, reason_of

logger = logging.getLogger(__name__)

SENT_FILE = "trackers.json"
"""In the folder of a run: what is Sent."""


@dataclass(frozen=True)
class Sent:
    """The last step that trackers have got, the names at it, and the run in Weights & Biases."""

    step: int = -1
    names: list[str] = field(default_factory=list)
    wandb_id: str = ""
    steps_per_epoch: int = 0

    def has(self, name: str, step: int) -> bool:
        return step < self.step or (step == self.step and name in self.names)


class Trackers:
    """Sends metrics of rank 0 to TensorBoard (log_dir) and to wandb (arguments of wandb.init).

    Args:
        log_dir: Folder of TensorBoard; None for none.
        wandb_options: None without Weights & Biases.
        is_main: Whether this is rank 0.
        folder: Folder of the run; '' for none.
        step: Steps taken so far. TensorBoard hides what is later, of an earlier start.
        steps_per_epoch: If it is another one than before (batch size, images), steps cannot be
            compared: Weights & Biases gets a new run, and TensorBoard hides nothing.
        wandb_id: The run in Weights & Biases to go on with, unless the folder names one.
        went_back: The run takes another course from an earlier checkpoint: Weights & Biases, which
            cannot take back steps, gets a new run.

    Raises UserError if a tracker can't be started.
    """

    def __init__(
        self,
        log_dir: str | None,
        wandb_options: dict[str, Any] | None,
        is_main: bool,
        folder: str = "",
        step: int = 0,
        steps_per_epoch: int = 0,
        wandb_id: str = "",
        went_back: bool = False,
    ) -> None:
        self.file = Path(folder) / SENT_FILE if folder else None
        self.step, self.before = step, Sent(steps_per_epoch=steps_per_epoch)
        if step:
            new = Sent(step, wandb_id=wandb_id, steps_per_epoch=steps_per_epoch)
            self.before = _read(self.file) or new
        purge_step: int | None = step + 1
        if self.before.steps_per_epoch != steps_per_epoch:
            self.before = replace(self.before, step=-1, steps_per_epoch=steps_per_epoch)
            purge_step, went_back = None, True
        self.sent = self.before
        self.tensorboard = _TensorBoard(log_dir, purge_step) if log_dir and is_main else None
        self.wandb: Any = None
        if wandb_options and is_main:
            known = self.before.wandb_id
            if went_back and known:
                logger.warning("Weights & Biases: the run %s stays as it is, and a new one begins "
                               "at step %d", known, step)  # fmt: skip
            self.is_new = went_back or not known
            self.wandb = _wandb_run(wandb_options, "" if self.is_new else known)
            if self.is_new:  # before the first line, so that a kill does not lose it
                self._save(Sent(min(self.before.step, step), [], self.wandb_id, steps_per_epoch))

    @property
    def wandb_id(self) -> str:
        """The id of the run in Weights & Biases, also if it is switched off; '' without one."""
        return self.wandb.id if self.wandb else self.before.wandb_id

    def write(self, values: dict[str, float], step: int) -> None:
        if not self.tensorboard and not self.wandb:
            return
        new = {name: value for name, value in values.items() if not self.before.has(name, step)}
        names = [*self.sent.names, *new] if step == self.sent.step else [*new]
        if self.tensorboard:
            try:
                # what is later than the checkpoint was hidden
                for name, value in (values if step > self.step else new).items():
                    self.tensorboard.add(name, value, step)
                self.tensorboard.flush()  # a kill would lose it
            except OSError as error:  # a full disk
                logger.warning("nothing more is written to --log_dir: %s", error)
                self.tensorboard = None
        # after TensorBoard, where a point written twice is still one; before Weights & Biases,
        # which takes no step twice
        self._save(replace(self.sent, step=step, names=names))
        sent = values if self.wandb and self.is_new else new
        if self.wandb and sent:  # without values, it would still get the step
            self.wandb.log(sent, step=step)

    def _save(self, sent: Sent) -> None:
        self.sent = sent
        if self.file:
            with suppress(OSError):  # then a resumed run goes on by the checkpoint's id
                self.file.write_text(json.dumps(asdict(sent)))

    def finish(self, checkpoints: Sequence[Path]) -> None:
        """Upload checkpoints to Weights & Biases, as one artifact, and close the trackers."""
        if self.wandb:
            import wandb

            artifact = wandb.Artifact(f"checkpoints-{self.wandb.id}", type="model")
            for file in checkpoints:
                artifact.add_file(str(file))
            if checkpoints:
                self.wandb.log_artifact(artifact)
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


class _TensorBoard:
    """Writes scalars in this thread: SummaryWriter.flush doesn't wait for its own thread.

    Args:
        folder: Gets a file of events.
        purge_step: TensorBoard hides what earlier files have from this step on; None for nothing.

    Raises UserError if the folder can't be written.
    """

    def __init__(self, folder: str, purge_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        try:
            if "://" not in folder:  # tensorboardX writes to buckets, too
                Path(folder).mkdir(parents=True, exist_ok=True)
            # without a suffix, a start within the same second would overwrite the file
            self._writer = EventsWriter(f"{folder}/events", f".{time.time_ns()}")
        except OSError as error:
            raise UserError(f"--log_dir {folder} cannot be written: {error}") from None
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(step=purge_step, session_log=start)
        self.flush, self.close = self._writer.flush, self._writer.close

    def add(self, name: str, value: float, step: int) -> None:
        self._write(step=step, summary=self._scalar(name, value))

    def _write(self, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **content))


def _read(file: Path | None) -> Sent | None:
    try:
        return Sent(**json.loads(file.read_text())) if file else None
    except (OSError, ValueError, TypeError):  # none, or a kill cut it off
        return None


def _wandb_run(options: dict[str, Any], known: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--enable_wandb true needs a package: pip install wandb") from None
    again: Any = {"id": known, "resume": "allow"} if known else {}
    try:
        return wandb.init(**options, **again)
    except wandb.Error as error:  # without a login, among others
        raise UserError(
            f"--enable_wandb true: {reason_of(error)}; "
            "WANDB_MODE=offline keeps the run on this machine"
        ) from None
