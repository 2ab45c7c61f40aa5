"""The evaluations of a run: after each epoch, or of a checkpoint, with files of predictions."""

import csv
import logging
import math
import tempfile
import uuid
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from checkpoints.fitting import check_classes, check_head, load_exactly
from checkpoints.reading import ema_weights_in, read_checkpoint, weights_in
from checkpoints.sources import local_file
from config import Config
from datasets import BadImages, Data, file_name, image_count
from engine import evaluate
from loaders import UNREADABLE, eval_loader
from models import checkpoint_filter_fn
from runtime.distributed import DistributedContext, broadcast_buffers
from runtime.errors import UserError
from trainer import Trainer, amp_dtype

logger = logging.getLogger(__name__)


def evaluate_epoch(
    config: Config, trainer: Trainer, data: Data, before_batch: Callable[[], None]
) -> tuple[dict[str, float], list[str]]:
    """The test_* entries of log.txt, and the names of the best checkpoints that are due.

    `before_batch` is called in all processes alike.
    """
    if data.val is None:
        return {}, []
    evaluated = [("test", "", "max_accuracy", "best", trainer.bare_model)]
    if trainer.ema and config.ema.model_ema_eval:
        ema = trainer.ema.module
        evaluated.append(("test EMA", "_ema", "max_ema_accuracy", "best-ema", ema))
    record: dict[str, float] = {}
    improved = []
    for title, suffix, _, _, model in evaluated:
        broadcast_buffers(model, trainer.context)
        metrics = _evaluate(config, title, model, data, trainer.context, before_batch=before_batch)
        record |= {f"test_{name}{suffix}": value for name, value in metrics.items()}
    # after all of them, since a run that is stopped in between evaluates anew
    for _, suffix, best, checkpoint_name, _ in evaluated:
        accuracy = record[f"test_acc1{suffix}"]
        # of equals the last: on few images accuracies repeat while the loss still falls
        is_sound = math.isfinite(record[f"test_loss{suffix}"])
        if is_sound and accuracy >= getattr(trainer.progress, best):
            setattr(trainer.progress, best, accuracy)
            improved.append(checkpoint_name)
        record[best] = getattr(trainer.progress, best)
    return record, improved


def evaluate_checkpoint(
    config: Config, model: nn.Module, data: Data, context: DistributedContext
) -> None:
    """Prints the accuracy of --resume; of its moving average too where --model_ema_eval asks.

    With an output_dir each image's prediction and each class's accuracy are written there.
    """
    path = config.checkpoint.resume
    checkpoint = read_checkpoint(local_file(path, context), model)
    check_classes(checkpoint, data.classes, path)
    evaluated = [("test", "", weights_in(checkpoint, path))]
    if config.ema.model_ema_eval:
        ema = ema_weights_in(checkpoint, path)
        if ema is None:
            raise UserError(f"--model_ema_eval true: checkpoint {path} holds no EMA")
        evaluated.append(("test EMA", "_ema", ema))
    for title, suffix, saved in evaluated:
        weights = checkpoint_filter_fn(saved, model)
        check_head(weights, model, data.classes, path)
        load_exactly(model, weights, path)
        predictions: list[torch.Tensor] = []
        _evaluate(config, title, model, data, context, predictions)
        if config.checkpoint.output_dir:
            folder = Path(config.checkpoint.output_dir)
            _write_predictions(folder, data, predictions[0], context, suffix)


def _evaluate(
    config: Config,
    title: str,
    model: nn.Module,
    data: Data,
    context: DistributedContext,
    predictions: list[torch.Tensor] | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    assert data.val is not None
    shared = _shares(config, data)
    bad_images = bad_images_of(config)
    loader = eval_loader(data.val, config.data, context, bad_images, shared)
    common = _common_batches(loader, data.val, context.world_size if shared else 1)

    def ask(index: int) -> None:
        if index < common:
            before_batch()

    turns = loader.batch_size if shared else None
    metrics = evaluate(model, loader, context, turns, amp_dtype(config.compute), predictions, ask)
    images = metrics.pop("images")
    if metrics.pop("unreadable"):
        logger.warning("images that cannot be read were left out: see %s", bad_images.path)
    logger.info(
        "%s on %d images: top-1 %.2f%%  top-5 %.2f%%  loss %.4f",
        title, images, metrics["acc1"], metrics["acc5"], metrics["loss"],
    )  # fmt: skip
    return metrics


def _common_batches(loader: DataLoader, dataset: Dataset, shares: int) -> int:
    """The number of batches that every process has for certain; its share may have one more."""
    if isinstance(dataset, IterableDataset):
        return 0  # where shards are damaged, each process may find another number
    batches = -(-image_count(dataset) // loader.batch_size)  # type: ignore[operator]
    return batches // shares


def bad_images_of(config: Config) -> BadImages:
    """The list of a run, in its output_dir; without one in a file of this process."""
    output_dir = config.checkpoint.output_dir
    folder = Path(output_dir) if output_dir else _temporary_folder()
    return BadImages(folder / "bad_images.txt", config.faults.max_bad_images)


@cache
def _temporary_folder() -> Path:
    # made when there is something to write
    return Path(tempfile.gettempdir()) / f"hornet-{uuid.uuid4().hex[:12]}"


def _shares(config: Config, data: Data) -> bool:
    """Whether each process evaluates its share; of a stream of images each sees all."""
    return config.evaluation.dist_eval and not isinstance(data.val, IterableDataset)


def _names(data: Data) -> list[str]:
    """What the images to evaluate on are called; those of a stream have no names."""
    if isinstance(data.val, IterableDataset) or data.val is None:
        return []
    return [file_name(data.val, index) for index in range(image_count(data.val))]


def _write_predictions(
    folder: Path, data: Data, rows: torch.Tensor, context: DistributedContext, suffix: str = ""
) -> None:
    """Writes both files, with `suffix` in their names, and logs the classes known worst.

    `rows` are the predictions of `engine.evaluate`. Raises UserError where the folder refuses the
    files.
    """
    if not context.is_main:
        return
    assert data.val is not None
    names = [name for name, row in zip(_names(data), rows, strict=False) if row[0] != UNREADABLE]
    rows = rows[rows[:, 0] != UNREADABLE]
    labels, guesses = rows[:, 0].long(), rows[:, 1].long()
    images = torch.bincount(labels, minlength=len(data.classes)).tolist()
    correct = torch.bincount(labels[labels == guesses], minlength=len(data.classes)).tolist()
    per_class = [
        (name, count, f"{100 * right / count:.2f}")
        for name, count, right in zip(data.classes, images, correct, strict=True)
        if count
    ]
    per_image = (
        (name, data.classes[label], data.classes[guess], f"{share:.4f}")
        for name, label, guess, share in zip(
            names, labels.tolist(), guesses.tolist(), rows[:, 2].tolist(), strict=False
        )
    )
    tables: dict[str, tuple[tuple[str, ...], Iterable[tuple]]] = {
        "predictions": (("file", "class", "predicted", "probability"), per_image),
        "accuracy_per_class": (("class", "images", "acc1"), per_class),
    }
    if isinstance(data.val, IterableDataset):  # its images have no names and no fixed order
        del tables["predictions"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (columns, lines) in tables.items():
            with (folder / f"{name}{suffix}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(lines)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error}") from None
    logger.info("%s are in %s", " and ".join(f"{name}{suffix}.csv" for name in tables), folder)
    for name, count, share in sorted(per_class, key=lambda row: float(row[2]))[:3]:
        logger.info("among the least known: class %s, %s%% of %d images", name, share, count)
