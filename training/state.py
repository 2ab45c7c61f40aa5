"""TrainState: everything that changes during training, and so is saved in checkpoints."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints.fitting import load_exactly
from checkpoints.reading import ema_weights_in, weights_in
from optim_factory import restore_optimizer
from runtime.distributed import DistributedContext, all_gather
from runtime.errors import UserError
from runtime.logging import read_log
from training.metrics import Meters
from training.nonfinite import NonFiniteSteps
from utils import versions

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = -1
    """The last finished epoch, counted from 0."""
    step: int = 0
    """Optimizer steps taken; also EMA updates."""
    position: int = 0
    """Images of the current epoch used so far, on all ranks together."""
    max_accuracy: float = 0.0
    """Best top-1 accuracy of the model, in per cent."""
    max_ema_accuracy: float = 0.0
    """Best top-1 accuracy of the EMA, in per cent."""


@dataclass
class TrainState:
    """Model, EMA, optimizer, loss scale, progress and running sums."""

    model: nn.Module
    """Wrapped by DistributedDataParallel if there is a process group."""
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    """Loss scale, for float16."""
    progress: Progress
    meters: Meters
    nonfinite: NonFiniteSteps

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DistributedDataParallel wrapper."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if wrapped else self.model  # type: ignore[return-value]

    def end_epoch(self) -> None:
        """Start the next epoch."""
        self.progress.epoch += 1
        self.progress.position = 0
        self.meters.epoch.zero_()

    def state_dict(self, context: DistributedContext) -> dict[str, Any]:
        """Return tensors and plain values, named as in the published checkpoints.

        All ranks have to call it, since their meters are gathered.

        Raises:
            UserError: a weight is not finite, so no run could resume from it.
        """
        weights = dict(self.bare_model.named_parameters())
        sizes = torch.stack(torch._foreach_norm(list(weights.values()), math.inf))
        if not sizes.isfinite().all():
            name = next(n for n, s in zip(weights, sizes, strict=True) if not s.isfinite())
            raise UserError(
                f"{name} is not finite after step {self.progress.step}: change --lr or --opt_eps; "
                "earlier checkpoints are intact"
            )
        meters = torch.stack((self.meters.epoch, self.meters.line)).cpu()
        return {
            "model": self.bare_model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meters": torch.stack(all_gather(meters, context)),
            "bad_steps": self.nonfinite.counts.cpu(),
            "versions": versions(),
            **asdict(self.progress),
        }

    def load_state_dict(
        self, saved: dict[str, Any], path: str | Path, context: DistributedContext
    ) -> None:
        """Restore `state_dict()`, read from `path`.

        The release's checkpoints have no step: `progress.step` is 0 then.

        Raises:
            UserError: it doesn't fit.
        """
        progress = _saved_progress(saved, Path(path), self.progress.epoch + 1)
        weights = weights_in(saved, path)
        load_exactly(self.bare_model, weights, path)
        if self.ema:
            ema_weights = ema_weights_in(saved, path)
            if ema_weights is None:
                logger.warning("%s has no EMA: it starts from the weights", path)
                ema_weights = weights
            load_exactly(self.ema.module, ema_weights, f"{path} (model_ema)")
        try:
            restore_optimizer(self.optimizer, saved["optimizer"])
            if self.scaler and saved.get("scaler"):
                if not 0 < saved["scaler"]["scale"] < float("inf"):
                    raise ValueError(f"its loss scale is {saved['scaler']['scale']}")
                self.scaler.load_state_dict(saved["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {path} has another optimizer ({error}): give the --opt, --freeze and "
                "--layer_decay of its run, or start over in another --output_dir"
            ) from None
        self.progress = progress
        meters = saved.get("meters")
        if torch.is_tensor(meters) and meters.shape[1:] == (2, *self.meters.epoch.shape):
            self.meters.load(meters, context.rank, context.world_size)
        elif meters is not None:
            raise UserError(f"checkpoint {path} cannot be resumed: its meters are damaged")
        self.nonfinite.load(saved.get("bad_steps"))


def _saved_progress(saved: dict[str, Any], path: Path, start_epoch: int) -> Progress:
    """Return how far the run of a checkpoint had come.

    In the release's files without a number, the epoch is a word. They have no best accuracy, which
    is read from the log.txt beside them.
    """
    epoch = saved.get("epoch")
    if epoch == "start":
        epoch = -1
    elif epoch in ("best", "best-ema") and start_epoch:
        epoch = start_epoch - 1
    if not isinstance(epoch, int) or not isinstance(saved.get("optimizer"), dict):
        missing = f"its epoch is {epoch!r}, not a number (see --start_epoch)"
        if isinstance(epoch, int):
            missing = "it has no optimizer state"
        raise UserError(
            f"checkpoint {path} cannot be resumed: {missing}; --finetune starts from its weights"
        )
    names = ("step", "position", "max_accuracy", "max_ema_accuracy")
    numbers = {name: saved.get(name, 0) for name in names}
    counts = [epoch + 1, numbers["step"], numbers["position"]]
    if not all(isinstance(count, int) and 0 <= count < 2**60 for count in counts) or not all(
        isinstance(number, int | float) and 0 <= number <= 2**60 for number in numbers.values()
    ):
        raise UserError(f"checkpoint {path} cannot be resumed: epoch {epoch}, {numbers}?")
    if "max_accuracy" not in saved and (path.parent / "log.txt").is_file():
        for record in read_log(path.parent):
            if record["epoch"] <= epoch:
                numbers |= {name: record[name] for name in numbers.keys() & record.keys()}
    return Progress(epoch, **numbers)
