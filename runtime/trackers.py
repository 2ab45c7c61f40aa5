"""Where a run's numbers go beside log.txt: TensorBoard and Weights & Biases."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import Config
from runtime.errors import UserError, reason_of


class Trackers:
    """Sends numbers to the trackers that the flags ask for; on other than the main process to none.

    Raises UserError where a tracker can't be had.
    """

    def __init__(self, config: Config, is_main: bool) -> None:
        self.tensorboard = self.wandb = None
        if config.logging.log_dir and is_main:
            self.tensorboard = _tensorboard(config.logging.log_dir)
        if config.logging.enable_wandb and is_main:
            self.wandb = _wandb_run(config)

    def write(self, values: dict[str, float], step: int) -> None:
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def save(self, files: Iterable[Path]) -> None:
        """Uploads checkpoints to Weights & Biases, as one artifact."""
        if self.wandb:
            import wandb

            artifact = wandb.Artifact(f"checkpoints-{self.wandb.id}", type="model")
            for file in files:
                artifact.add_file(str(file))
            self.wandb.log_artifact(artifact)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _tensorboard(folder: str) -> Any:
    from tensorboardX import SummaryWriter

    try:
        return SummaryWriter(logdir=folder)
    except OSError as error:
        raise UserError(f"--log_dir {folder} cannot be written: {error}") from None


def _wandb_run(config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--enable_wandb true needs a package: pip install wandb") from None
    try:
        return wandb.init(
            project=config.logging.project,
            name=config.logging.exp_name,
            config=config.flat(),
            dir=config.checkpoint.output_dir or None,
        )
    except wandb.Error as error:  # without a login, among others
        raise UserError(
            f"--enable_wandb true: {reason_of(error)}; "
            "WANDB_MODE=offline keeps the run on this machine"
        ) from None
