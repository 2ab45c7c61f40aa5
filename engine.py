"""The two loops: one epoch of training, and evaluation."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from input_pipeline.loaders import Batch
from runtime.distributed import DistributedContext, all_gather_shards
from runtime.errors import UserError
from runtime.logging import Throughput
from runtime.trackers import Trackers
from training.build import TrainSetup
from training.state import TrainState
from utils import seed_everything, stream_seed

logger = logging.getLogger(__name__)


def train_one_epoch(
    state: TrainState,
    setup: TrainSetup,
    batches: Iterable[Batch],
    trackers: Trackers | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Take the remaining steps of an epoch; return its mean metrics.

    Args:
        batches: Images (N, 3, H, W) and labels, (N) or multi-hot (N, classes), from
            progress.position on, update_freq of them per step.
        trackers: Get the metrics of each log line; in between they stay on the device.
        after_step: Called after each step, when the state may be saved.

    Raises NonFiniteError if max_bad_steps steps in a row were non-finite.
    """
    progress, steps = state.progress, setup.schedule.steps_per_epoch
    rate = partial(setup.schedule.learning_rate, plateau=progress.rate_factor)
    state.model.train()
    speed, iterator = Throughput(), iter(batches)
    with logging_redirect_tqdm():
        title = f"epoch {progress.epoch + 1}"
        for index in _bar(range(setup.steps_taken(progress), steps), title, setup.context):
            setup.schedule.apply(state.optimizer, progress.step, progress.rate_factor)
            train_step(state, setup, iterator, speed)
            progress.step += 1
            progress.position += setup.total_batch
            if (index + 1) % setup.config.logging.log_interval == 0 or index + 1 == steps:
                metrics = state.meters.end_line()
                if setup.config.data.is_multi_label:
                    del metrics["class_acc"]
                _log_line(state, setup, index + 1, metrics | {"lr": rate(progress.step - 1)}, speed)
                if trackers:
                    trackers.write({f"train/{k}": v for k, v in metrics.items()}, progress.step)
                speed = Throughput()
                state.nonfinite.check(state.trained, rate)
            after_step()
    metrics = state.meters.of_epoch()
    if setup.mixup or setup.config.data.is_multi_label:
        del metrics["class_acc"]  # the images have more than one class
    groups = state.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    decay = max(group["weight_decay"] for group in groups)
    return metrics | {"lr": max(rates), "min_lr": min(rates), "weight_decay": decay}


def train_step(
    state: TrainState, setup: TrainSetup, batches: Iterator[Batch], speed: Throughput
) -> None:
    """Take an optimizer step on the mean gradient of update_freq micro-batches on all ranks.

    All ranks skip the update if the gradient is not finite.
    """
    config, context, step = setup.config, setup.context, state.progress.step
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    sums = torch.zeros(5, dtype=torch.float64, device=context.device)
    for micro in range(config.optim.update_freq):
        images, labels = _next_batch(batches, context.device, step, speed)
        # random numbers depend on seed, step and rank only, so that a run can resume here
        seed_everything(stream_seed("step", config.runtime.seed, step, micro, context.rank))
        ends_step = micro + 1 == config.optim.update_freq
        # to be clipped, a running sum has to be that of all ranks
        clips = ends_step or config.optim.clip_mode == "micro"
        ddp = state.model if isinstance(state.model, nn.parallel.DistributedDataParallel) else None
        with ddp.no_sync() if ddp and not clips else nullcontext():
            loss, logits = _forward_backward(state, setup, images, labels)
        if ends_step and state.scaler:
            state.scaler.unscale_(state.optimizer)
        if clips:
            trained = [p for p in parameters if p.grad is not None]
            norms = clip_gradient(trained, config.optim.clip_grad)
        sums[0] += loss * len(labels)
        if labels.ndim == 1:
            sums[1] += (logits.argmax(dim=1) == labels).sum()
        sums[2] += len(labels)
    norm = torch.linalg.vector_norm(norms)
    finite = norm.isfinite()
    sums[3] += norm
    sums[4] += 1
    state.meters.line += torch.where(finite, sums, 0)
    state.nonfinite.record(finite, trained, norms, step)
    _update(state, finite)
    state.optimizer.zero_grad(set_to_none=True)
    speed.steps += 1


def _next_batch(
    batches: Iterator[Batch], device: torch.device, step: int, speed: Throughput
) -> Batch:
    waiting_since = time.perf_counter()
    batch = next(batches, None)
    if batch is None:
        raise UserError(
            f"no images left in step {step}: the shards of the data set are damaged, or hold fewer "
            "images than stated"
        )
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    speed.waited += time.perf_counter() - waiting_since
    speed.images += len(images)
    return images, labels


def _forward_backward(
    state: TrainState, setup: TrainSetup, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of a micro-batch; return its mean loss and its logits, detached."""
    targets = labels
    if setup.mixup:
        images, targets = setup.mixup(images, labels)
    distillation = setup.distillation
    with _autocast(setup.context.device, setup.precision):
        outputs = state.model(images)
        to_learn = distillation.targets(images) if distillation else None
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs)
    logits = outputs[0]
    loss = setup.criterion(logits, targets)
    if distillation and to_learn is not None:
        loss = distillation.loss(loss, outputs[-1], to_learn)
    mean = loss / setup.config.optim.update_freq
    (state.scaler.scale(mean) if state.scaler else mean).backward()
    return loss.detach(), logits.detach()


def clip_gradient(parameters: list[nn.Parameter], largest: float | None) -> torch.Tensor:
    """Clip the gradient to the 2-norm `largest`, if given; return the norm per parameter before."""
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, torch.linalg.vector_norm(norms))
    return norms


def _update(state: TrainState, finite: torch.Tensor) -> None:
    """Update the weights, if the gradient is finite, and the EMA.

    Fused Adam and AdamW skip a step without synchronisation; other optimizers wait for the device.
    """
    optimizer: Any = state.optimizer
    if state.scaler:
        state.scaler.step(optimizer)  # skips non-finite steps
        state.scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    for ema in state.emas.values():
        # given a step, timm's update copies the weights in the first one
        ema.update(state.bare_model, state.progress.step + 1 if ema.use_warmup else None)


def _autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision is not None)


def _bar(batches: Iterable, title: str, context: DistributedContext) -> Iterable:
    """Show a progress bar, on terminals and rank 0 only."""
    return tqdm(batches, desc=title, leave=False, disable=None if context.is_main else True)


def _log_line(
    state: TrainState, setup: TrainSetup, index: int, metrics: dict[str, float], speed: Throughput
) -> None:
    schedule, progress = setup.schedule, state.progress
    logger.info(
        "epoch %d  step %d/%d  loss %.4f  lr %.2e  grad norm %.3g  %s",
        progress.epoch + 1, index, schedule.steps_per_epoch, metrics["loss"],
        metrics["lr"], metrics["grad_norm"],
        speed.summary(schedule.total_steps - progress.step, setup.context.world_size),
    )  # fmt: skip


@torch.inference_mode()
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    context: DistributedContext,
    row_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch_size: int | None = None,
    precision: torch.dtype | None = None,
    before_batch: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Run `model` on all images; return `row_of` logits and labels, (images, row) on the CPU.

    Args:
        model: Without its DistributedDataParallel wrapper, since ranks may differ in their number
            of batches.
        batches: Images (N, 3, H, W) and labels, (N) or (N, classes). A model may return several
            rows of logits per image, one after another, as of a point cloud's views; each counts
            as an image.
        batch_size: Ranks share the images in batches of this size (`shard`), and all get the same
            results, whatever the world size. None: each rank evaluates all images.
        precision: dtype of autocast.
        before_batch: Called with the index of each batch.
    """
    model.eval()
    device = next(model.parameters()).device
    found = [torch.empty(0, device=device)]
    for index, (images, labels) in enumerate(_bar(batches, "evaluation", context)):
        before_batch(index)
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        with _autocast(device, precision):
            logits = model(images).float()
        views = len(logits) // len(labels)
        rows = row_of(logits, labels.repeat_interleave(views, dim=0))
        found.append(rows.unflatten(0, (-1, views)))
    results = torch.cat(found[1:] or found).cpu()
    if batch_size:
        results = all_gather_shards(results, batch_size, context)
    return results.flatten(0, 1) if results.numel() else results


def evaluate(
    model: nn.Module, batches: Iterable[Batch], context: DistributedContext, **options: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """Evaluate a classifier on images with one label each, negative for unreadable images.

    The arguments are those of `collect`. Returns mean loss, acc1 and acc5 (top-1 and top-5 accuracy
    in per cent), images and unreadable (counts); and a tensor (images, 8) of label, prediction, its
    probability, and the five classes of highest probability (-2 where there are fewer). Raises
    UserError if no image can be read.
    """
    results = collect(model, batches, context, _row, **options)
    readable = results[results[:, 1] >= 0] if results.numel() else results
    if not len(readable):
        raise UserError("no evaluation image can be read")
    losses, labels, predicted, _, *top = readable.T
    in_top5 = (torch.stack(top) == labels).any(dim=0)
    metrics = {
        "loss": losses.mean().item(),
        "acc1": 100 * (labels == predicted).sum().item() / len(readable),
        "acc5": 100 * in_top5.sum().item() / len(readable),
        "images": len(readable),
        "unreadable": len(results) - len(readable),
    }
    return metrics, results[:, 1:]


def _row(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return loss, label, prediction, its probability and the five best classes, (N, 9)."""
    losses = nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    top5 = nn.functional.pad(top5, (0, 5 - top5.shape[1]), value=-2)  # -1 is unreadable
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    facts = (losses, labels, predicted, probability, *top5.T)
    return torch.stack([fact.double() for fact in facts], dim=1)
