"""Predictions for many images: read by workers, told in order as they come, shared by processes."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from inference.classifier import Classifier
from inference.labels import as_unicode
from input_pipeline.loaders import loader_of
from runtime.distributed import DistributedContext, barrier
from runtime.errors import UserError
from runtime.files import written_whole
from runtime.sizes import size_text

Prediction = list[tuple[str, float]] | str
"""The most probable classes with their probabilities, or why the image cannot be read."""
PER_PART = 5000  # images that a process predicts between two files
COLUMNS = ("image", "rank", "class", "probability")
FORMATS = (".csv", ".jsonl")


class _Inputs(Dataset[tuple[Path, torch.Tensor | str]]):
    def __init__(self, files: list[Path], classifier: Classifier) -> None:
        self.files, self.view = files, classifier.preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Path, torch.Tensor | str]:
        file = self.files[index]
        try:
            return file, self.view.transform(self.view.load(file))
        except UserError as error:
            return file, str(error)


def _as_lists(batch: list[tuple[Path, Any]]) -> tuple[list[Path], list[Any]]:
    files, inputs = zip(*batch, strict=True)
    return [*files], [*inputs]


@torch.inference_mode()
def predictions(
    classifier: Classifier,
    files: list[Path],
    device: torch.device,
    topk: int,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[tuple[Path, Prediction]]:
    """Yield the prediction of each file, in order; UserError if the model takes no such images."""
    model, names = classifier.model.to(device), classifier.labels
    source = _Inputs(files, classifier)
    loader = loader_of(source, num_workers, batch_size=batch_size, collate_fn=_as_lists)
    for part, inputs in loader:
        readable = [x for x in inputs if not isinstance(x, str)]
        found: Iterator[Prediction] = iter(())
        if readable:
            try:
                logits = model(torch.stack(readable).to(device)).float()
            except (ValueError, RuntimeError, AssertionError) as error:
                size = size_text(classifier.preprocessing.input_size)
                raise UserError(f"--input-size {size}: the model fails: {error}") from None
            values, labels = classifier.probabilities(logits).topk(min(topk, len(names)))
            found = (
                [(names[i], share) for i, share in zip(own, shares, strict=True)]
                for own, shares in zip(labels.tolist(), values.tolist(), strict=True)
            )
        for file, x in zip(part, inputs, strict=True):
            yield file, x if isinstance(x, str) else next(found)


def write_predictions(
    classifier: Classifier,
    files: list[Path],
    output: Path,
    context: DistributedContext,
    command: str,
    topk: int,
    batch_size: int,
    num_workers: int,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, str]:
    """Write the predictions for `files` into FILE.csv or FILE.jsonl; return unreadable images.

    `command` tells the options. The processes of `context` take parts of the files in turn. Parts
    that are done stay in the folder FILE.parts, so a command that was stopped goes on with the
    others. `tell` gets the number of images done by this process.

    Raises UserError if the file is there already or cannot be written, or if FILE.parts is of
    other images or options.
    """
    folder = output.with_name(f"{output.name}.parts")
    starts = range(0, len(files), PER_PART)
    try:
        if context.is_main:
            _begin(output, folder, _digest(command, files, topk))
        barrier()
        for number in range(context.rank, len(starts), context.world_size):
            own = files[starts[number] : starts[number] + PER_PART]
            part = folder / f"{number:06d}"
            if not part.is_file():
                every = predictions(classifier, own, context.device, topk, batch_size, num_workers)
                text, bad = io.StringIO(), {}
                for file, found in every:
                    if isinstance(found, str):
                        bad[as_unicode(file)] = found
                    else:
                        text.write(_line(output, file, found))
                    tell(1)
                with written_whole(part) as written:
                    content = json.dumps(bad) + "\n" + text.getvalue()
                    written.write_text(content, encoding="utf-8", errors="surrogateescape")
            else:
                tell(len(own))
        barrier()
        return _join(output, folder, len(starts)) if context.is_main else {}
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None


def _digest(command: str, files: list[Path], topk: int) -> str:
    digest = hashlib.blake2b(f"{command}\n{topk}\n".encode(errors="surrogateescape"))
    for file in files:
        digest.update(os.fsencode(file) + b"\n")
    return digest.hexdigest()


def _begin(output: Path, folder: Path, digest: str) -> None:
    facts = folder / "command"
    if output.exists():
        raise UserError(f"{output} exists already: give another name")
    if folder.exists() and (not facts.is_file() or facts.read_text() != digest):
        raise UserError(f"{folder} is of other images or options: remove it")
    folder.mkdir(exist_ok=True)
    facts.write_text(digest)


def _line(output: Path, file: Path, found: list[tuple[str, float]]) -> str:
    if output.suffix == ".jsonl":
        classes = [{"class": as_unicode(name), "probability": share} for name, share in found]
        return json.dumps({"image": as_unicode(file), "predictions": classes}) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(rows_of(file, found))
    return text.getvalue()


def rows_of(file: Path, found: list[tuple[str, float]]) -> list[tuple[Any, ...]]:
    """Return the rows of a CSV file with COLUMNS."""
    return [(file, rank, name, f"{share:.4f}") for rank, (name, share) in enumerate(found, start=1)]


def _join(output: Path, folder: Path, parts: int) -> dict[str, str]:
    unreadable: dict[str, str] = {}
    with written_whole(output) as written, written.open("wb") as whole:
        if output.suffix == ".csv":
            whole.write((",".join(COLUMNS) + "\n").encode())
        for number in range(parts):
            with (folder / f"{number:06d}").open("rb") as part:
                unreadable |= json.loads(part.readline())
                shutil.copyfileobj(part, whole)
    shutil.rmtree(folder)
    return unreadable
