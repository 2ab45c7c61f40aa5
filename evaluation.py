"""The evaluations of a run: after each epoch, or of a checkpoint with files of predictions."""

import copy
import csv
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints import fitting, reading
from checkpoints.sources import local_file
from config.flags import Config
from datasets import Data
from engine import evaluate
from input_pipeline.image_sets import ImageSet
from input_pipeline.loaders import UNREADABLE, eval_loader
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import DistributedContext, broadcast_buffers
from runtime.errors import UserError
from training.build import TrainSetup, amp_dtype
from training.state import TrainState

logger = logging.getLogger(__name__)


class Evaluation:
    """The evaluation images of a run with their loader, whose workers live through all epochs."""

    def __init__(self, config: Config, data: Data, context: DistributedContext) -> None:
        assert data.val is not None
        self.config, self.images, self.context = config, data.val, context
        # each rank evaluates all images of a stream
        self.is_shared = config.evaluation.dist_eval and isinstance(data.val, ImageSet)
        self.unreadable = UnreadableImages.of_run(config)
        self.loader = eval_loader(
            data.val, config.data, context, self.unreadable, config.evaluation.dist_eval
        )

    def of(
        self, model: nn.Module, suffix: str, before_batch: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Evaluate a model and log its accuracy; return metrics and `engine.evaluate`'s rows."""
        batch_size: Any = self.loader.batch_size
        common = 0  # batches that all ranks have for certain: with damaged shards, none
        if isinstance(self.images, ImageSet):
            ranks = self.context.world_size if self.is_shared else 1
            common = math.ceil(len(self.images) / batch_size) // ranks

        def ask(index: int) -> None:
            if index < common:
                before_batch()

        size, precision = batch_size if self.is_shared else None, amp_dtype(self.config.compute)
        metrics, rows = evaluate(model, self.loader, self.context, size, precision, ask)
        images = metrics.pop("images")
        if metrics.pop("unreadable"):
            logger.warning("unreadable images are left out: see %s", self.unreadable.path)
        logger.info(
            "test%s on %d images: top-1 %.2f%%  top-5 %.2f%%  loss %.4f",
            " EMA" if suffix else "", images, metrics["acc1"], metrics["acc5"], metrics["loss"],
        )  # fmt: skip
        return metrics, rows


def evaluate_epoch(
    state: TrainState,
    setup: TrainSetup,
    evaluation: Evaluation | None,
    before_batch: Callable[[], None],
) -> tuple[dict[str, float], list[str]]:
    """Return the test_* entries of log.txt, and the names of the best checkpoints to save.

    `before_batch` is called the same number of times on all ranks.
    """
    if evaluation is None:
        return {}, []
    models = {"": state.bare_model}
    if state.ema and setup.config.ema.model_ema_eval:
        # in host memory (--model_ema_force_cpu) it would take minutes where a GPU takes seconds
        models["_ema"] = _on_device(state.ema.module, setup.context.device)
    record: dict[str, float] = {}
    for suffix, model in models.items():
        broadcast_buffers(model, setup.context)
        metrics, _ = evaluation.of(model, suffix, before_batch)
        record |= {f"test_{name}{suffix}": value for name, value in metrics.items()}
    # after all of them, since a run that is stopped in between evaluates again
    improved = []
    for suffix in models:
        best = "max_ema_accuracy" if suffix else "max_accuracy"
        accuracy, loss = record[f"test_acc1{suffix}"], record[f"test_loss{suffix}"]
        # on a tie, the later: on few images accuracies repeat while the loss still falls
        if math.isfinite(loss) and accuracy >= getattr(state.progress, best):
            setattr(state.progress, best, accuracy)
            improved.append("best-ema" if suffix else "best")
        record[best] = getattr(state.progress, best)
    return record, improved


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model, or its copy, on the device."""
    if next(model.parameters()).device == device:
        return model
    return copy.deepcopy(model).to(device)


def evaluate_checkpoint(
    config: Config, model: nn.Module, data: Data, context: DistributedContext
) -> None:
    """Log the accuracy of --resume, and of its EMA with --model_ema_eval.

    In output_dir, if given, predictions.csv and accuracy_per_class.csv are written.
    """
    path = config.checkpoint.resume
    checkpoint = reading.read_checkpoint(local_file(path, context), model)
    evaluated = {"": reading.weights_in(checkpoint, path)}
    if config.ema.model_ema_eval:
        ema = reading.ema_weights_in(checkpoint, path)
        if ema is None:
            raise UserError(f"--model_ema_eval true: checkpoint {path} has no EMA")
        evaluated["_ema"] = ema
    evaluation = Evaluation(config, data, context)
    for suffix, saved in evaluated.items():
        weights = fitting.own_names(saved, model)
        fitting.check_head(weights, model, data.classes, path)
        fitting.load_saved(model, checkpoint, weights, path, context, config.finetune)
        _, predictions = evaluation.of(model, suffix)
        logger.info("mean accuracy of the classes: %.2f%%", mean_class_accuracy(predictions))
        if config.checkpoint.output_dir and context.is_main:
            _write_predictions(Path(config.checkpoint.output_dir), data, predictions, suffix)


def mean_class_accuracy(rows: torch.Tensor) -> float:
    """Return the mean of the accuracies of the classes that occur, in per cent.

    `rows` are those of `engine.evaluate`.
    """
    images, correct = _counts(rows)
    return 100 * (correct / images)[images > 0].mean().item()


def _counts(rows: torch.Tensor, classes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, and the correct predictions, of at least so many `classes`."""
    labels, guesses, _ = rows[rows[:, 0] != UNREADABLE].long().T
    images = torch.bincount(labels, minlength=classes)
    return images, torch.bincount(labels[labels == guesses], minlength=len(images))


def _write_predictions(folder: Path, data: Data, rows: torch.Tensor, suffix: str) -> None:
    images, correct = (counts.tolist() for counts in _counts(rows, len(data.classes)))
    counts = zip(data.classes, images, correct, strict=True)
    per_class = [(name, n, f"{100 * right / n:.2f}") for name, n, right in counts if n]
    tables: dict[str, list[tuple]] = {}
    if isinstance(data.val, ImageSet):  # images of a stream have no names
        tables["predictions"] = [("file", "class", "predicted", "probability")] + [
            (data.val.name(i), data.classes[int(label)], data.classes[int(guess)], f"{share:.4f}")
            for i, (label, guess, share) in enumerate(rows.tolist())
            if label != UNREADABLE
        ]
    tables["accuracy_per_class"] = [("class", "images", "acc1"), *per_class]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            with (folder / f"{name}{suffix}.csv").open(
                "w", newline="", errors="surrogateescape"
            ) as file:
                csv.writer(file).writerows(lines)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error}") from None
    logger.info("%s are in %s", " and ".join(f"{name}{suffix}.csv" for name in tables), folder)
    worst = sorted((row for row in per_class if row[2] != "100.00"), key=lambda row: float(row[2]))
    for name, count, accuracy in worst[:3]:
        logger.info("among the worst: class %s, %s%% of %d images", name, accuracy, count)
