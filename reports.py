"""What an evaluation leaves behind: predictions.csv and accuracy_per_class.csv."""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from datasets import Data, file_name
from runtime.distributed import DistributedContext, all_gather_shards
from runtime.errors import UserError

logger = logging.getLogger(__name__)


def write_evaluation(
    folder: Path,
    data: Data,
    predictions: list[torch.Tensor],
    context: DistributedContext,
    shared: bool,
    suffix: str = "",
) -> None:
    """Writes both files, with `suffix` in their names, and logs the classes known worst.

    `predictions` are those of `engine.evaluate` in this process, on its share of the images or on
    all of them. Raises UserError where the folder refuses the files.
    """
    rows = torch.cat(predictions)
    if shared:
        rows = all_gather_shards(rows, context)
    if not context.is_main:
        return
    assert data.val is not None
    labels, guesses = rows[:, 0].long(), rows[:, 1].long()
    images = torch.bincount(labels, minlength=len(data.classes)).tolist()
    correct = torch.bincount(labels[labels == guesses], minlength=len(data.classes)).tolist()
    per_class = [
        (name, count, f"{100 * right / count:.2f}")
        for name, count, right in zip(data.classes, images, correct, strict=True)
        if count
    ]
    per_image = (
        (file_name(data.val, index), data.classes[label], data.classes[guess], f"{share:.4f}")
        for index, (label, guess, share) in enumerate(
            zip(labels.tolist(), guesses.tolist(), rows[:, 2].tolist(), strict=True)
        )
    )
    tables: dict[str, tuple[tuple[str, ...], Iterable[tuple]]] = {
        "predictions": (("file", "class", "predicted", "probability"), per_image),
        "accuracy_per_class": (("class", "images", "acc1"), per_class),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (columns, lines) in tables.items():
            with (folder / f"{name}{suffix}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(lines)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error}") from None
    worst = sorted(per_class, key=lambda row: float(row[2]))[:3]
    logger.info(
        "%s are in %s; lowest: %s", " and ".join(f"{name}{suffix}.csv" for name in tables), folder,
        ", ".join(f"{name} {share}% of {count}" for name, count, share in worst),
    )  # fmt: skip
