"""TrainState: everything that changes during training, and so is saved in checkpoints."""

import logging
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from checkpoints import fitting, reading
from config.flags import FinetuneConfig, ScheduleConfig
from optim_factory import restore_optimizer
from runtime.distributed import DistributedContext, all_gather, all_reduce_sum
from runtime.errors import UserError
from runtime.logging import read_log
from training.distillation import Student
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
    rate_factor: float = 1.0
    """Factor on the learning rate, of --sched plateau."""
    stale_evaluations: int = 0
    """Evaluations since the best accuracy or the last change of rate_factor."""

    def find_plateau(self, improved: bool, config: ScheduleConfig) -> None:
        """Lower rate_factor after more than patience_epochs evaluations without improvement."""
        self.stale_evaluations = 0 if improved else self.stale_evaluations + 1
        if self.stale_evaluations > config.patience_epochs:
            self.rate_factor *= config.decay_rate
            self.stale_evaluations = 0


class Meters:
    """Sums of this rank since the start of the epoch and since the last log line.

    Each tensor holds: loss x images, correct predictions, images, gradient norms, steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.epoch = torch.zeros(5, dtype=torch.float64, device=device)
        self.line = torch.zeros_like(self.epoch)

    def end_line(self) -> dict[str, float]:
        """Return the means since the last line (NaN without a finite step) and start a new line."""
        means = self.means(self.line)
        self.epoch += self.line
        self.line.zero_()
        return means

    def of_epoch(self) -> dict[str, float]:
        """Return the means of all ranks since the start of the epoch."""
        return self.means(all_reduce_sum(self.epoch.clone()))

    @staticmethod
    def means(sums: torch.Tensor) -> dict[str, float]:
        loss, correct, images, norms, steps = sums.tolist()
        if not steps:
            return dict.fromkeys(("loss", "class_acc", "grad_norm"), math.nan)
        accuracy = 100 * correct / images
        return {"loss": loss / images, "class_acc": accuracy, "grad_norm": norms / steps}

    def load(self, saved: torch.Tensor, rank: int, world_size: int) -> None:
        """Restore the sums of all ranks, (world size then, 2, 5).

        With the same world size each rank gets its own sums back; otherwise rank 0 gets the total.
        """
        if len(saved) != world_size:
            total, ranks_then = saved.sum(0), len(saved)
            saved = torch.zeros(world_size, *total.shape, dtype=total.dtype)
            saved[0] = total
            saved[0, :, 3:] *= world_size / ranks_then  # each rank counts all norms and steps
        self.epoch.copy_(saved[rank, 0])
        self.line.copy_(saved[rank, 1])


@dataclass
class TrainState:
    """Model, EMA, optimizer, loss scale, progress and running sums."""

    model: nn.Module
    """Wrapped by Student with --distill features, then by DistributedDataParallel if there is a
    process group."""
    emas: dict[str, ModelEmaV3]
    """The EMA by the name ema, if any, and those of --model_ema_more by names such as ema_0.99."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    """Loss scale, for float16."""
    progress: Progress
    meters: Meters
    nonfinite: NonFiniteSteps

    @property
    def ema(self) -> ModelEmaV3 | None:
        return self.emas.get("ema")

    @property
    def trained(self) -> nn.Module:
        """All that is trained: the model without its DistributedDataParallel wrapper."""
        wrapped = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.module if wrapped else self.model  # type: ignore[return-value]

    @property
    def bare_model(self) -> nn.Module:
        """The model without its wrappers."""
        return self.trained.model if isinstance(self.trained, Student) else self.trained

    def end_epoch(self) -> None:
        self.progress.epoch += 1
        self.progress.position = 0
        self.meters.epoch.zero_()

    def state_dict(self, context: DistributedContext) -> dict[str, Any]:
        """Return tensors and plain values, named as in the published checkpoints.

        All ranks have to call it, since their meters are gathered. Raises UserError if a weight is
        not finite, so that no run could resume from it.
        """
        weights = dict(self.trained.named_parameters())
        sizes = torch.stack(torch._foreach_norm(list(weights.values()), math.inf))
        if not sizes.isfinite().all():
            name = next(n for n, s in zip(weights, sizes, strict=True) if not s.isfinite())
            raise UserError(
                f"{name} is not finite after step {self.progress.step}: change --lr or --opt_eps; "
                "earlier checkpoints are intact"
            )
        meters = torch.stack((self.meters.epoch, self.meters.line)).cpu()
        extra: dict[str, Any] = {}
        if isinstance(self.trained, Student):
            extra["projection"] = self.trained.projection.state_dict()
        return extra | {
            "model": self.bare_model.state_dict(),
            "model_ema": None,
            **{f"model_{name}": ema.module.state_dict() for name, ema in self.emas.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meters": torch.stack(all_gather(meters, context)),
            "bad_steps": self.nonfinite.counts.cpu(),
            "versions": versions(),
            **asdict(self.progress),
        }

    def load_state_dict(
        self,
        saved: dict[str, Any],
        path: str | Path,
        context: DistributedContext,
        start: FinetuneConfig | None = None,
        options: Collection[str] = (),
    ) -> None:
        """Restore `state_dict()`, read from `path`; UserError if it doesn't fit.

        What the checkpoint has left out is read from `start`. `options` of the optimizer stay as
        they are, as those that have flags do.

        The release's checkpoints have no step: `progress.step` is 0 then.
        """
        progress = _saved_progress(saved, Path(path), self.progress.epoch + 1)
        weights = reading.weights_in(saved, path)
        fitting.load_saved(self.bare_model, saved, weights, path, context, start)
        if isinstance(self.trained, Student):
            projection = saved.get("projection")
            if not isinstance(projection, dict):
                raise UserError(f"checkpoint {path} is not of a run with --distill features")
            fitting.load_exactly(self.trained.projection, projection, f"{path} (projection)")
        for name, ema in self.emas.items():
            ema_weights = reading.ema_weights_in(saved, path, f"model_{name}")
            if ema_weights is None:
                logger.warning("%s has no %s: it starts from the weights", path, f"model_{name}")
                ema_weights = weights
            fitting.load_exactly(ema.module, ema_weights, f"{path} (model_{name})")
        try:
            restore_optimizer(self.optimizer, saved["optimizer"], options)
            if self.scaler and (scaler := saved.get("scaler")):
                if not 0 < scaler["scale"] < math.inf:
                    raise ValueError(f"its loss scale is {scaler['scale']}")
                self.scaler.load_state_dict(scaler)
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

    `start_epoch` (--start_epoch) is for files of the release whose epoch is a word. They have no
    best accuracy, which is read from the log.txt beside them.
    """
    epoch = saved.get("epoch")
    if epoch == "start":
        epoch = -1
    elif epoch in ("best", "best-ema") and start_epoch:
        epoch = start_epoch - 1
    refused = f"checkpoint {path} cannot be resumed"
    if not isinstance(epoch, int) or not isinstance(saved.get("optimizer"), dict):
        what = f"its epoch is {epoch!r}, not a number (see --start_epoch)"
        what = "it has no optimizer state" if isinstance(epoch, int) else what
        raise UserError(f"{refused}: {what}; --finetune starts from its weights")
    defaults = {f.name: f.default for f in fields(Progress) if f.name != "epoch"}
    numbers: dict[str, Any] = {name: saved.get(name, value) for name, value in defaults.items()}
    counts = [epoch + 1, *(numbers[n] for n in ("step", "position", "stale_evaluations"))]
    if not all(isinstance(count, int) and 0 <= count < 2**60 for count in counts) or not all(
        isinstance(number, int | float) and 0 <= number <= 2**60 for number in numbers.values()
    ):
        raise UserError(f"{refused}: epoch {epoch}, {numbers}?")
    if "max_accuracy" not in saved and (path.parent / "log.txt").is_file():
        for record in read_log(path.parent):
            if record["epoch"] <= epoch:
                numbers |= {name: record[name] for name in numbers.keys() & record.keys()}
    return Progress(epoch, **numbers)
