"""Evaluation of images with any number of classes each: mAP and F1 instead of accuracies."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import Batch, collect
from input_pipeline.image_sets import UNREADABLE
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from runtime.files import write_table


def evaluate(
    model: nn.Module, batches: Iterable[Batch], context: DistributedContext, **options: Any
) -> tuple[dict[str, float], Tensor]:
    """Evaluate a classifier on images with multi-hot labels, negative for unreadable images.

    The arguments are those of `engine.collect`. Returns, in per cent, mAP (the mean over the
    classes of `average_precisions`), f1_micro (of all decisions at a probability of 0.5 together)
    and f1_macro (the mean over these classes), further the mean binary cross entropy (loss), images
    and unreadable (counts); and a tensor (images, 2, classes) of labels and logits. UserError if no
    image can be read, or none has a class.
    """

    def row_of(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.cat((labels, logits), dim=1)

    results = collect(model, batches, context, row_of, **options)
    if results.numel():
        results = results.unflatten(1, (2, -1))
    readable = results[results[:, 0, 0] != UNREADABLE] if results.numel() else results
    if not len(readable):
        raise UserError("no evaluation image can be read")
    labels, logits = readable.unbind(1)
    if not labels.any():
        raise UserError("no evaluation image that can be read has a class")
    hits, guesses, truths = counts(labels, logits)
    present = truths > 0
    metrics = {
        "loss": nn.functional.binary_cross_entropy_with_logits(logits, labels).item(),
        "mAP": 100 * average_precisions(labels, logits).nanmean().item(),
        "f1_micro": 100 * (2 * hits.sum() / (guesses + truths).sum()).item(),
        "f1_macro": 100 * (2 * hits / (guesses + truths))[present].mean().item(),
        "images": len(readable),
        "unreadable": len(results) - len(readable),
    }
    return metrics, results


def counts(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each class the correct predictions, all predictions, and the images, (classes)."""
    guesses = logits >= 0
    return (guesses & labels.bool()).sum(0), guesses.sum(0), labels.bool().sum(0)


def average_precisions(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the average precision of each class, NaN for a class that no image has.

    Labels and logits are (images, classes). It is the mean precision at the images of the class,
    sorted by logit, without interpolation (scikit-learn's). Probabilities would have ties: of large
    logits they are all 1. NaN counts as the smallest logit.
    """
    from sklearn.metrics import average_precision_score  # takes seconds, which only this needs

    scores = logits.nan_to_num(nan=torch.finfo(logits.dtype).min)
    return torch.tensor([
        average_precision_score(truth, score) if truth.any() else float("nan")
        for truth, score in zip(labels.T.numpy(), scores.T.numpy(), strict=True)
    ])  # fmt: skip


def write_tables(
    folder: Path, classes: list[str], files: list[str], rows: Tensor, suffix: str
) -> list[Path]:
    """Write predictions.csv and metrics_per_class.csv; return them.

    `rows` are those of `evaluate`, of readable images.
    """
    labels, logits = rows.unbind(1)
    shares, guesses = logits.sigmoid(), logits >= 0

    def names(row: Tensor) -> str:
        return ";".join(classes[i] for i in row.nonzero().flatten().tolist())

    predictions = [("file", "labels", "predicted", *classes)] + [
        (file, names(label), names(guess), *(f"{share:.4f}" for share in probabilities.tolist()))
        for file, label, guess, probabilities in zip(files, labels, guesses, shares, strict=True)
    ]
    hits, guessed, truths = counts(labels, logits)
    # 0 / 0, of a class that is not predicted or that no image has, is NaN
    columns = (average_precisions(labels, logits), hits / guessed, hits / truths,
               2 * hits / (guessed + truths))  # fmt: skip
    per_class = [("class", "images", "AP", "precision", "recall", "f1")] + [
        (name, count, *(f"{100 * value:.2f}" for value in values))
        for name, count, values in zip(
            classes, truths.tolist(), torch.stack(columns, dim=1).tolist(), strict=True
        )
    ]
    tables = {"predictions": predictions, "metrics_per_class": per_class}
    paths = [folder / f"{name}{suffix}.csv" for name in tables]
    for path, lines in zip(paths, tables.values(), strict=True):
        write_table(path, lines)
    return paths
