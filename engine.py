"""One epoch of training, and evaluation."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config import LoggingConfig
from runtime.distributed import DistributedContext, all_gather_shards
from runtime.errors import UserError
from runtime.logging import Throughput
from runtime.trackers import Trackers
from trainer import Trainer
from utils import seed_everything, stream_seed, topk_correct

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def train_one_epoch(
    trainer: Trainer,
    batches: Batches,
    logging_config: LoggingConfig = LoggingConfig(),  # noqa: B008  (frozen)
    trackers: Trackers | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Takes what is left of schedule.steps_per_epoch steps; returns the epoch's mean metrics.

    `batches` yields images (N, 3, H, W) and labels (N), update_freq of them a step, from
    progress.position on. Metrics stay on the device from one log line to the next. `after_step` is
    called when the trainer's state is whole; `Trainer.end_epoch` ends the epoch, after its
    evaluation. Raises BadRun where max_bad_steps steps in a
    row had no finite gradient.
    """
    progress, steps = trainer.progress, trainer.schedule.steps_per_epoch
    trainer.model.train()
    speed = Throughput()
    iterator = iter(batches)
    with logging_redirect_tqdm():
        for index in _bar(
            range(trainer.steps_of_epoch, steps), f"epoch {progress.epoch + 1}", trainer.context
        ):
            trainer.schedule.apply(trainer.optimizer, progress.step)
            train_step(trainer, iterator, speed)
            progress.step += 1
            progress.position += trainer.total_batch
            if (index + 1) % logging_config.log_interval == 0 or index + 1 == steps:
                metrics = trainer.meters.end_line()
                _log_line(trainer, index + 1, metrics, speed)
                if trackers:
                    trackers.write({f"train/{k}": v for k, v in metrics.items()}, progress.step)
                speed.reset()
                _check_bad_steps(trainer)
            after_step()
    metrics = trainer.meters.of_epoch()
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
    trainer: Trainer, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], speed: Throughput
) -> None:
    """One optimizer step on the mean gradient of update_freq micro-batches.

    It is left out in all processes where the gradient, which is that of all of them, is not
    finite. Adam and AdamW, when fused, see to that on the device; others wait for the answer.
    """
    optim, device, progress = trainer.optim, trainer.context.device, trainer.progress
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for micro in range(optim.update_freq):
        waiting_since = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise UserError(
                f"the images ended before step {progress.step} was whole: the shards of the data "
                "set are damaged, or hold fewer images than it says"
            )
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        speed.waited += time.perf_counter() - waiting_since
        speed.images += len(images)

        # whatever is drawn at random follows from the step's number, so that a run can go on here
        numbers = (trainer.seed, progress.step, micro, trainer.context.rank)
        seed_everything(stream_seed("step", *numbers))
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
            trained = [p for p in parameters if p.grad is not None]
            norms = _clip(trained, optim.clip_grad)
        sums[0] += loss.detach() * len(labels)
        sums[1] += topk_correct(logits.detach(), labels, 1)
        sums[2] += len(labels)
    norm = torch.linalg.vector_norm(norms)
    finite = norm.isfinite()
    sums[3] += norm
    sums[4] += 1
    trainer.meters.line += torch.where(finite, sums, 0)
    trainer.bad_steps.note(finite, trained, norms, progress.step)
    _update(trainer, finite)
    trainer.optimizer.zero_grad(set_to_none=True)
    speed.steps += 1


def _update(trainer: Trainer, finite: torch.Tensor) -> None:
    """The step of the optimizer, where the gradient is finite, and that of the moving average."""
    optimizer: Any = trainer.optimizer
    if trainer.scaler:
        trainer.scaler.step(optimizer)  # skips the step itself, and lowers the scale
        trainer.scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    if trainer.ema:  # after a step that was left out it comes nearer to the same weights
        trainer.ema.update(trainer.bare_model)


def _autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision is not None)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _gradient_sync(model: nn.Module, synchronise: bool) -> AbstractContextManager:
    if synchronise or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def _clip(parameters: list[nn.Parameter], largest: float | None) -> torch.Tensor:
    """Clips the gradient to the 2-norm `largest`, if given; the norms of its parts before that."""
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    if largest is not None:
        clip_grads_with_norm_(parameters, largest, torch.linalg.vector_norm(norms))
    return norms


class BadRun(UserError):  # noqa: N818
    """Too many steps in a row had no finite gradient; `report` tells of the last one."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def _check_bad_steps(trainer: Trainer) -> None:
    """Raises BadRun where there are too many; tells of new ones."""
    _, most, total, last = trainer.bad_steps.counts.tolist()
    if total > trainer.bad_steps.told:
        trainer.bad_steps.told = total
        logger.warning("%d steps without a finite gradient were left out so far, the last: step %d",
                       total, last)  # fmt: skip
    if most < trainer.max_bad_steps:
        return
    named = {id(p): name for name, p in trainer.bare_model.named_parameters()}
    names = [named[id(p)] for p in trainer.bad_steps.parameters]
    norms = [x if math.isfinite(x) else str(x) for x in trainer.bad_steps.norms.tolist()]
    raise BadRun(
        f"the gradient was not finite in {most} steps in a row, the last of them step {last}: "
        "go back by --resume to a checkpoint from before them, with a lower --lr or --clip_grad",
        {
            "step": last,
            "learning_rate": trainer.schedule.learning_rate(last),
            "gradient_norms": dict(zip(names, norms, strict=True)),
        },
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
    batch_size: int | None = None,
    precision: torch.dtype | None = None,
    predictions: list[torch.Tensor] | None = None,
    before_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 (per cent) of `model` over all images, and their number.

    `batch_size`: the processes take turns at batches of that size, and all get all results, in the
    order of the images, so that nothing depends on the number of processes; None: each process sees
    all images. Labels below 0 are those of unreadable images, which do not count. `model` is the
    bare one, since shares may differ in their batches. `predictions` gets one tensor (N, 3): label,
    predicted class, and its probability. `before_batch` is called with the number of each batch.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = [torch.empty(0, 5, dtype=torch.float64, device=device)]
    for index, (images, labels) in enumerate(_bar(batches, "evaluation", context)):
        before_batch(index)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with _autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        probability, predicted = logits.softmax(dim=1).max(dim=1)
        facts = (labels, predicted, probability, losses, top5.any(dim=1))
        rows.append(torch.stack([fact.double() for fact in facts], dim=1))
    whole = torch.cat(rows).cpu()
    if batch_size:
        whole = all_gather_shards(whole, batch_size, context)
    if predictions is not None:
        predictions.append(whole[:, :3])
    readable = whole[whole[:, 0] >= 0]
    if not len(readable):
        raise UserError("there is no image to evaluate on that can be read")
    labels, predicted, _, losses, top5 = readable.T
    return {
        "loss": losses.mean().item(),
        "acc1": 100 * (labels == predicted).sum().item() / len(readable),
        "acc5": 100 * top5.sum().item() / len(readable),
        "images": len(readable),
        "unreadable": len(whole) - len(readable),
    }
