"""Metrics to TensorBoard and Weights & Biases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError, reason_of


class Trackers:
    """Sends metrics of rank 0 to TensorBoard (log_dir) and to wandb (arguments of wandb.init).

    Raises:
        UserError: a tracker can't be started.
    """

    def __init__(
        self, log_dir: str | None, wandb_options: dict[str, Any] | None, is_main: bool
    ) -> None:
        self.tensorboard = _tensorboard(log_dir) if log_dir and is_main else None
        self.wandb = _wandb_run(wandb_options) if wandb_options and is_main else None

    def write(self, values: dict[str, float], step: int) -> None:
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

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


def _tensorboard(folder: str) -> Any:
    from tensorboardX import SummaryWriter

    try:
        return SummaryWriter(logdir=folder)
    except OSError as error:
        raise UserError(f"--log_dir {folder} cannot be written: {error}") from None


def _wandb_run(options: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--enable_wandb true needs a package: pip install wandb") from None
    try:
        return wandb.init(**options)
    except wandb.Error as error:  # without a login, among others
        raise UserError(
            f"--enable_wandb true: {reason_of(error)}; "
            "WANDB_MODE=offline keeps the run on this machine"
        ) from None
