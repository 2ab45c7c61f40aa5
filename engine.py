"""One epoch of training, and evaluation."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config import LoggingConfig
from runtime.distributed import DistributedContext, all_reduce_sum
from runtime.errors import UserError
from runtime.logging import Throughput
from runtime.trackers import Trackers
from trainer import Progress, Trainer
from utils import topk_correct

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def train_one_epoch(
    trainer: Trainer,
    batches: Batches,
    logging_config: LoggingConfig = LoggingConfig(),  # noqa: B008  (frozen)
    trackers: Trackers | None = None,
) -> dict[str, float]:
    """Takes schedule.steps_per_epoch optimizer steps; returns the epoch's mean metrics.

    `batches` yields images (N, 3, H, W) and labels (N), update_freq of them a step. Metrics stay
    on the device from one log line to the next. Raises UserError when loss or gradient are not
    finite at such a line.
    """
    progress, steps = trainer.progress, trainer.schedule.steps_per_epoch
    trainer.model.train()
    epoch_totals = _Totals(trainer.context.device)
    since_log = _Totals(trainer.context.device)
    speed = Throughput()
    iterator = iter(batches)
    with logging_redirect_tqdm():
        for index in _bar(range(steps), f"epoch {progress.epoch + 1}", trainer.context):
            trainer.schedule.apply(trainer.optimizer, progress.step)
            train_step(trainer, iterator, since_log, speed)
            progress.step += 1
            if (index + 1) % logging_config.log_interval == 0 or index + 1 == steps:
                metrics = since_log.means()
                _check_finite(metrics, progress)
                _log_line(trainer, index + 1, metrics, speed)
                if trackers:
                    trackers.write({f"train/{k}": v for k, v in metrics.items()}, progress.step)
                epoch_totals.add(since_log)
                since_log = _Totals(trainer.context.device)
                speed.reset()
    all_reduce_sum(epoch_totals.values)
    metrics = epoch_totals.means()
    if trainer.mixup:
        del metrics["class_acc"]  # mixed images have no single right class
    return metrics | _rates(trainer.optimizer)


def _bar(batches: Iterable, title: str, context: DistributedContext) -> Iterable:
    """A progress bar where a person watches: on a terminal, by the main process."""
    return tqdm(batches, desc=title, leave=False, disable=None if context.is_main else True)


def _log_line(trainer: Trainer, index: int, metrics: dict[str, float], speed: Throughput) -> None:
    schedule, progress = trainer.schedule, trainer.progress
    left = schedule.config.total_steps(schedule.steps_per_epoch) - progress.step
    logger.info(
        "epoch %d  step %d/%d  loss %.4f  lr %.2e  grad norm %.3g  %s",
        progress.epoch + 1, index, schedule.steps_per_epoch, metrics["loss"],
        schedule.learning_rate(progress.step - 1), metrics["grad_norm"],
        speed.summary(left, trainer.context.world_size),
    )  # fmt: skip


def train_step(
    trainer: Trainer,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    totals: "_Totals",
    speed: Throughput,
) -> None:
    """One optimizer step on the mean gradient of update_freq micro-batches."""
    optim, device = trainer.optim, trainer.context.device
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    norm = torch.zeros((), device=device)
    for micro in range(optim.update_freq):
        waiting_since = time.perf_counter()
        images, labels = next(batches)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        speed.waited += time.perf_counter() - waiting_since
        speed.images += len(images)

        targets = labels
        if trainer.mixup:
            images, targets = trainer.mixup(images, labels)
        ends_step = micro + 1 == optim.update_freq
        # clipping a running sum needs it to be the sum over all processes
        with _gradient_sync(trainer.model, ends_step or optim.clip_mode == "micro"):
            with _autocast(device, trainer.precision):
                logits = trainer.model(images)
            loss = trainer.criterion(_at_least_float32(logits), targets)
            mean = loss / optim.update_freq
            (trainer.scaler.scale(mean) if trainer.scaler else mean).backward()
        if ends_step and trainer.scaler:
            trainer.scaler.unscale_(trainer.optimizer)
        if ends_step or optim.clip_mode == "micro":
            norm = _clip(parameters, optim.clip_grad)
        totals.add_batch(loss.detach(), logits.detach(), labels)
    if trainer.scaler:
        norm = norm.nan_to_num(0, 0, 0)  # an overflow skips the step and lowers the scale
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
    else:
        trainer.optimizer.step()
    totals.add_step(norm)
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.ema:
        trainer.ema.update(trainer.bare_model)
    speed.steps += 1


def _autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision is not None)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _gradient_sync(model: nn.Module, synchronise: bool) -> AbstractContextManager:
    if synchronise or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def _clip(parameters: list[nn.Parameter], largest: float | None) -> torch.Tensor:
    """Clips the gradient to the 2-norm `largest`, if given; returns its norm before that."""
    if largest is not None:
        return clip_grad_norm_(parameters, largest)
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


class _Totals:
    """Sums that stay on the device: loss x images, right answers, images, gradient norms, steps."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, dtype=torch.float64, device=device)

    def add_batch(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.values[0] += loss * len(labels)
        self.values[1] += topk_correct(logits, labels, 1)
        self.values[2] += len(labels)

    def add_step(self, norm: torch.Tensor) -> None:
        self.values[3] += norm
        self.values[4] += 1

    def add(self, other: "_Totals") -> None:
        self.values += other.values

    def means(self) -> dict[str, float]:
        loss, correct, images, norms, steps = self.values.tolist()
        return {
            "loss": loss / images,
            "class_acc": 100 * correct / images,
            "grad_norm": norms / steps,
        }


def _check_finite(metrics: dict[str, float], progress: Progress) -> None:
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        raise UserError(
            f"the loss is {metrics['loss']} and the norm of the gradient {metrics['grad_norm']} "
            f"at step {progress.step} (epoch {progress.epoch + 1}): "
            "lower --lr or clip the gradient by --clip_grad; checkpoints saved so far are intact"
        )


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    rates = [group["lr"] for group in optimizer.param_groups]
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    return {"lr": max(rates), "min_lr": min(rates), "weight_decay": decay}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    context: DistributedContext,
    shared: bool = True,
    precision: torch.dtype | None = None,
    predictions: list[torch.Tensor] | None = None,
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 (per cent) of `model` over all images, and their number.

    `shared`: each process sees its own share of the images, and the sums are joined; otherwise
    each sees them all. `model` is the bare one, since shares may differ in their batches.
    `predictions` gets a tensor (N, 3) a batch: label, predicted class, and its probability.
    """
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=context.device)
    for images, labels in _bar(batches, "evaluation", context):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with _autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        loss_sum = nn.functional.cross_entropy(logits, labels, reduction="sum")
        batch = (loss_sum, topk_correct(logits, labels, 1), topk_correct(logits, labels, 5))
        totals[:3] += torch.stack([value.double() for value in batch]).to(totals.device)
        totals[3] += len(labels)
        if predictions is not None:
            probability, predicted = logits.softmax(dim=1).max(dim=1)
            predictions.append(torch.stack((labels, predicted, probability.double()), dim=1).cpu())
    if shared:
        all_reduce_sum(totals)
    loss, top1, top5, images_seen = totals.tolist()
    return {
        "loss": loss / images_seen,
        "acc1": 100 * top1 / images_seen,
        "acc5": 100 * top5 / images_seen,
        "images": int(images_seen),
    }
