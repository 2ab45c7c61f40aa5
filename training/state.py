"""TrainState: all that changes during training, and so all that a checkpoint holds."""

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
    """Optimizer steps taken; also the number of updates of the EMA."""
    position: int = 0
    """Images of the next epoch that have been used, by all ranks together."""
    max_accuracy: float = 0.0
    """Best top-1 of the model, in per cent."""
    max_ema_accuracy: float = 0.0
    """Best top-1 of its EMA, in per cent."""


@dataclass
class TrainState:
    """Model, EMA, optimizer, loss scale, progress and running sums."""

    model: nn.Module
    """Wrapped by DistributedDataParallel where there is a process group."""
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    """Scales the loss in float16."""
    progress: Progress
    meters: Meters
    nonfinite: NonFiniteSteps

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DistributedDataParallel wrapper."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if wrapped else self.model  # type: ignore[return-value]

    def end_epoch(self) -> None:
        """The next epoch begins."""
        self.progress.epoch += 1
        self.progress.position = 0
        self.meters.epoch.zero_()

    def state_dict(self, context: DistributedContext) -> dict[str, Any]:
        """Tensors and plain values, under the names of the published checkpoints.

        Every rank has to call it: their meters are gathered. Raises UserError where weights are not
        finite any more, from which nothing could resume.
        """
        weights = dict(self.bare_model.named_parameters())
        sizes = torch.stack(torch._foreach_norm(list(weights.values()), math.inf))
        if not sizes.isfinite().all():
            name = next(n for n, s in zip(weights, sizes, strict=True) if not s.isfinite())
            raise UserError(
                f"{name} is not finite after step {self.progress.step}: see --opt_eps and --lr; "
                "checkpoints saved before are intact"
            )
        meters = torch.stack((self.meters.epoch, self.meters.line)).cpu()
        return {
            "model": self.bare_model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meters": all_gather(meters, context),
            "bad_steps": self.nonfinite.counts.cpu(),
            "versions": versions(),
            **asdict(self.progress),
        }

    def load_state_dict(
        self, saved: dict[str, Any], path: str | Path, context: DistributedContext
    ) -> None:
        """Restores `state_dict()`, read from `path`; raises UserError where it does not fit.

        A checkpoint of the release knows no step: `progress.step` is then left at 0.
        """
        progress = _saved_progress(saved, Path(path), self.progress.epoch + 1)
        weights = weights_in(saved, path)
        load_exactly(self.bare_model, weights, path)
        if self.ema:
            ema_weights = ema_weights_in(saved, path)
            if ema_weights is None:
                logger.warning("%s holds no EMA: it starts from the weights", path)
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
    """How far the run of a checkpoint had come.

    The release writes a word for the epoch in files that are not numbered, and no best accuracy:
    that is read from the log.txt beside them.
    """
    epoch = saved.get("epoch")
    if epoch == "start":
        epoch = -1
    elif epoch in ("best", "best-ema") and start_epoch:
        epoch = start_epoch - 1
    if not isinstance(epoch, int) or not isinstance(saved.get("optimizer"), dict):
        missing = f"its epoch is {epoch!r}, not a number (see --start_epoch)"
        if isinstance(epoch, int):
            missing = "it has no state of the optimizer"
        raise UserError(
            f"checkpoint {path} cannot be resumed: {missing}; --finetune starts over from its "
            "weights"
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
