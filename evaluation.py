"""The evaluations of a run: after each epoch, or of a checkpoint, with files of predictions."""

import csv
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoints.fitting import check_classes, check_head, load_exactly
from checkpoints.reading import ema_weights_in, read_checkpoint, weights_in
from checkpoints.sources import local_file
from config import Config
from datasets import Data
from engine import evaluate
from input_pipeline.image_sets import ImageSet
from input_pipeline.loaders import UNREADABLE, eval_loader
from input_pipeline.unreadable import UnreadableImages
from models import checkpoint_filter_fn
from runtime.distributed import DistributedContext, broadcast_buffers
from runtime.errors import UserError
from training.build import amp_dtype
from training.state import TrainState

logger = logging.getLogger(__name__)


def evaluate_epoch(
    config: Config,
    state: TrainState,
    data: Data,
    context: DistributedContext,
    before_batch: Callable[[], None],
) -> tuple[dict[str, float], list[str]]:
    """The test_* entries of log.txt, and the names of the best checkpoints that are due.

    `before_batch` is called on all ranks alike.
    """
    if data.val is None:
        return {}, []
    evaluated = [("test", "", "max_accuracy", "best", state.bare_model)]
    if state.ema and config.ema.model_ema_eval:
        ema = state.ema.module
        evaluated.append(("test EMA", "_ema", "max_ema_accuracy", "best-ema", ema))
    record: dict[str, float] = {}
    improved = []
    for title, suffix, _, _, model in evaluated:
        broadcast_buffers(model, context)
        metrics = _evaluate(config, title, model, data, context, before_batch=before_batch)
        record |= {f"test_{name}{suffix}": value for name, value in metrics.items()}
    # after all of them, since a run that is stopped in between evaluates again
    for _, suffix, best, checkpoint_name, _ in evaluated:
        accuracy = record[f"test_acc1{suffix}"]
        # on a tie, the later: on few images accuracies repeat while the loss still falls
        is_sound = math.isfinite(record[f"test_loss{suffix}"])
        if is_sound and accuracy >= getattr(state.progress, best):
            setattr(state.progress, best, accuracy)
            improved.append(checkpoint_name)
        record[best] = getattr(state.progress, best)
    return record, improved


def evaluate_checkpoint(
    config: Config, model: nn.Module, data: Data, context: DistributedContext
) -> None:
    """Logs the accuracy of --resume; of its EMA too where --model_ema_eval asks for it.

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
        if config.checkpoint.output_dir and context.is_main:
            folder = Path(config.checkpoint.output_dir)
            _write_predictions(folder, data, predictions[0], suffix)


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
    # of a stream each rank sees all images
    shares = config.evaluation.dist_eval and isinstance(data.val, ImageSet)
    unreadable = UnreadableImages.of_run(config)
    loader = eval_loader(data.val, config.data, context, unreadable, shares)
    common = _common_batches(loader, data, context.world_size if shares else 1)

    def ask(index: int) -> None:
        if index < common:
            before_batch()

    turns = loader.batch_size if shares else None
    metrics = evaluate(model, loader, context, turns, amp_dtype(config.compute), predictions, ask)
    images = metrics.pop("images")
    if metrics.pop("unreadable"):
        logger.warning("images that cannot be read were left out: see %s", unreadable.path)
    logger.info(
        "%s on %d images: top-1 %.2f%%  top-5 %.2f%%  loss %.4f",
        title, images, metrics["acc1"], metrics["acc5"], metrics["loss"],
    )  # fmt: skip
    return metrics


def _common_batches(loader: DataLoader, data: Data, ranks: int) -> int:
    """The number of batches that every rank has for certain; its share may have one more."""
    if not isinstance(data.val, ImageSet):
        return 0  # where shards are damaged, each rank may find another number
    batches = -(-len(data.val) // loader.batch_size)  # type: ignore[operator]
    return batches // ranks


def _write_predictions(folder: Path, data: Data, rows: torch.Tensor, suffix: str) -> None:
    """Writes predictions.csv and accuracy_per_class.csv, and logs the worst classes.

    Args:
        folder: Where to.
        data: Names the images and classes.
        rows: The predictions of `engine.evaluate`.
        suffix: Goes into the names of the files.

    Raises:
        UserError: the folder can't be written.
    """
    per_class = _accuracy_per_class(rows[rows[:, 0] != UNREADABLE], data.classes)
    tables: dict[str, tuple[tuple[str, ...], Iterable[tuple]]] = {
        "accuracy_per_class": (("class", "images", "acc1"), per_class)
    }
    if isinstance(data.val, ImageSet):  # those of a stream have no names and no fixed order
        names = [data.val.name(index) for index in range(len(data.val))]
        per_image = (
            (name, data.classes[int(label)], data.classes[int(guess)], f"{probability:.4f}")
            for name, (label, guess, probability) in zip(names, rows.tolist(), strict=True)
            if label != UNREADABLE
        )
        titles = ("file", "class", "predicted", "probability")
        tables = {"predictions": (titles, per_image)} | tables
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
    for name, count, accuracy in sorted(per_class, key=lambda row: float(row[2]))[:3]:
        logger.info("among the worst: class %s, %s%% of %d images", name, accuracy, count)


def _accuracy_per_class(rows: torch.Tensor, classes: list[str]) -> list[tuple[str, int, str]]:
    """(class, number of images, top-1 in per cent) of the classes that have images."""
    labels, guesses = rows[:, 0].long(), rows[:, 1].long()
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    correct = torch.bincount(labels[labels == guesses], minlength=len(classes)).tolist()
    return [
        (name, count, f"{100 * right / count:.2f}")
        for name, count, right in zip(classes, images, correct, strict=True)
        if count
    ]
