"""Predictions for many images: read by workers, told in order as they come, shared by processes."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset, default_collate

from inference.classifier import Classifier
from inference.labels import as_unicode
from inference.preprocessing import Preprocessing
from input_pipeline.loaders import finish_on, loader_of
from runtime.distributed import DistributedContext, barrier
from runtime.errors import UserError
from runtime.files import written_whole
from runtime.sizes import size_text

PER_PART = 5000  # images that a process predicts between two files
COLUMNS = ("image", "rank", "class", "probability")
FORMATS = (".csv", ".jsonl")
FEATURE_FORMATS = (".npy", ".safetensors")
EXACT = 0.005  # largest difference of a probability for which half precision is exact enough


@dataclass(frozen=True)
class Prediction:
    """What a classifier finds in an image file."""

    file: Path
    classes: list[tuple[str, float]] = field(default_factory=list)
    """The most probable ones, with their probabilities."""
    problem: str = ""
    """Why the image cannot be read; then there are no classes."""
    features: torch.Tensor | None = None
    """What the head takes, (num_features)."""


class _Inputs(Dataset[tuple[Path, torch.Tensor | str]]):
    def __init__(self, files: list[Path], view: Preprocessing) -> None:
        self.files, self.view = files, view

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Path, torch.Tensor | str]:
        file = self.files[index]
        try:
            return file, self.view.transform.for_batch(self.view.load(file))
        except UserError as error:
            return file, str(error)


def _batch(
    samples: list[tuple[Path, Any]],
) -> tuple[list[Path], list[str], torch.Tensor | None]:
    """Return files, what is wrong with each ("" if nothing), and the readable images (N, 3, H, W).

    Torch's collation writes them into memory that is shared with the main process.
    """
    files, found = zip(*samples, strict=True)
    readable = [x for x in found if not isinstance(x, str)]
    problems = [x if isinstance(x, str) else "" for x in found]
    return [*files], problems, default_collate(readable) if readable else None


@torch.inference_mode()
def predictions(
    classifier: Classifier,
    files: list[Path],
    device: torch.device,
    topk: int,
    batch_size: int,
    num_workers: int = 0,
    precision: torch.dtype | None = None,
    with_features: bool = False,
) -> Iterator[Prediction]:
    """Yield the prediction of each file, in order; UserError if the model takes no such images.

    `precision` is that of autocast.
    """
    model, names, view = classifier.model.to(device), classifier.labels, classifier.preprocessing
    finish = finish_on(device, view.transform)
    loader = loader_of(_Inputs(files, view), num_workers, batch_size=batch_size, collate_fn=_batch)
    for part, problems, images in loader:
        found: Iterator[Any] = iter(())
        if images is not None:
            inputs = finish(images)
            try:
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    logits, features = _outputs(model, inputs, with_features)
            except (ValueError, RuntimeError, AssertionError) as error:
                size = size_text(view.input_size)
                raise UserError(f"--input-size {size}: the model fails: {error}") from None
            values, labels = classifier.probabilities(logits).topk(min(topk, len(names)))
            found = zip(labels.tolist(), values.tolist(), features, strict=True)
        for file, problem in zip(part, problems, strict=True):
            if problem:
                yield Prediction(file, problem=problem)
                continue
            own, shares, row = next(found)
            classes = [(names[i], share) for i, share in zip(own, shares, strict=True)]
            yield Prediction(file, classes, features=row)


def _outputs(
    model: Any, inputs: torch.Tensor, with_features: bool
) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
    """Return the logits (N, classes), and of each image the features (num_features) or None."""
    if not with_features:
        logits = model(inputs).float()
        return logits, [None] * len(logits)
    features = model.forward_head(model.forward_features(inputs), pre_logits=True)
    return model.get_classifier()(features).float(), features.float().cpu()


@torch.inference_mode()
def lower_precision(
    classifier: Classifier, files: list[Path], device: torch.device
) -> torch.dtype | None:
    """Return float16 if it is exact enough on the first images, else None for float32."""
    half = (
        [
            *predictions(
                classifier, files[:8], device, len(classifier.labels), 8, precision=precision
            )
        ]
        for precision in (None, torch.float16)
    )
    for exact, found in zip(*half, strict=True):
        shares = dict(exact.classes)
        if not all(abs(shares[name] - share) < EXACT for name, share in found.classes):
            return None
    return torch.float16


def write_predictions(
    predict: Callable[[list[Path]], Iterable[Prediction]],
    files: list[Path],
    output: Path | None,
    features: Path | None,
    context: DistributedContext,
    command: str,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, str]:
    """Write the predictions for `files`; return unreadable images, with the reasons.

    `command` tells what `predict` depends on. The processes of `context` take parts of the files in
    turn. Parts that are done stay in the folder FILE.parts, so a command that was stopped goes on
    with the others.

    Args:
        output: FILE.csv or FILE.jsonl for the classes.
        features: FILE.npy or FILE.safetensors for float32 features (images, num_features). The
            image of each row is in FILE.images.csv.
        tell: Gets the number of images done by this process.

    Raises UserError if a file is there already or cannot be written, or if FILE.parts is of other
    images or options.
    """
    target = output or features
    assert target is not None
    folder = target.with_name(f"{target.name}.parts")
    starts = range(0, len(files), PER_PART)
    try:
        if context.is_main:
            _begin([path for path in (output, features) if path], folder, _digest(command, files))
        barrier()
        for number in range(context.rank, len(starts), context.world_size):
            own = files[starts[number] : starts[number] + PER_PART]
            part = folder / f"{number:06d}"
            if part.is_file():
                tell(len(own))
            else:
                _write_part(part, predict(own), output, features is not None, tell)
        barrier()
        return _join(output, features, folder, files) if context.is_main else {}
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


def _digest(command: str, files: list[Path]) -> str:
    digest = hashlib.blake2b(f"{command}\n".encode(errors="surrogateescape"))
    for file in files:
        digest.update(os.fsencode(file) + b"\n")
    return digest.hexdigest()


def _begin(outputs: list[Path], folder: Path, digest: str) -> None:
    facts = folder / "command"
    if folder.exists():
        if not facts.is_file() or facts.read_text() != digest:
            raise UserError(f"{folder} is of other images or options: remove it")
        return
    for path in outputs:
        if path.exists():
            raise UserError(f"{path} exists already: give another name")
    folder.mkdir()
    facts.write_text(digest)


def _write_part(
    part: Path,
    found: Iterable[Prediction],
    output: Path | None,
    with_features: bool,
    tell: Callable[[int], None],
) -> None:
    text, unreadable, rows = io.StringIO(), {}, []
    for one in found:
        if one.problem:
            unreadable[as_unicode(one.file)] = one.problem
        else:
            text.write(_line(output, one) if output else "")
            rows.append(one.features)
        tell(1)
    if with_features and rows:
        np.save(part.with_suffix(".npy"), torch.stack(rows).numpy())  # type: ignore[arg-type]
    with written_whole(part) as written:  # last: it tells that the part is done
        content = json.dumps(unreadable) + "\n" + text.getvalue()
        written.write_text(content, encoding="utf-8", errors="surrogateescape")


def _line(output: Path, found: Prediction) -> str:
    if output.suffix == ".jsonl":
        classes = [
            {"class": as_unicode(name), "probability": share} for name, share in found.classes
        ]
        return json.dumps({"image": as_unicode(found.file), "predictions": classes}) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(rows_of(found))
    return text.getvalue()


def rows_of(found: Prediction) -> list[tuple[Any, ...]]:
    """Return the rows of a CSV file with COLUMNS."""
    return [
        (found.file, rank, name, f"{share:.4f}")
        for rank, (name, share) in enumerate(found.classes, start=1)
    ]


def _join(
    output: Path | None, features: Path | None, folder: Path, files: list[Path]
) -> dict[str, str]:
    """Put the parts together, and remove them; return the unreadable images."""
    parts = [folder / f"{number:06d}" for number in range(-(-len(files) // PER_PART))]
    unreadable: dict[str, str] = {}
    for part in parts:
        with part.open("rb") as opened:
            unreadable |= json.loads(opened.readline())
    if output:
        with written_whole(output) as written, written.open("wb") as whole:
            if output.suffix == ".csv":
                whole.write((",".join(COLUMNS) + "\n").encode())
            for part in parts:
                with part.open("rb") as opened:
                    opened.readline()
                    shutil.copyfileobj(opened, whole)
    rows = [part.with_suffix(".npy") for part in parts if part.with_suffix(".npy").is_file()]
    if features and rows:
        _join_features(features, folder, rows)
        table = features.with_name(f"{features.stem}.images.csv")
        with written_whole(table) as written, written.open("w", errors="surrogateescape") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("image",))
            writer.writerows((file,) for file in files if as_unicode(file) not in unreadable)
    shutil.rmtree(folder)
    return unreadable


def _join_features(features: Path, folder: Path, parts: list[Path]) -> None:
    """Join arrays through files that are mapped into memory, which may be too small for them."""
    opened = [np.load(part, mmap_mode="r") for part in parts]
    shape = (sum(map(len, opened)), opened[0].shape[1])
    with written_whole(features) as written:
        is_npy = features.suffix == ".npy"
        where = written if is_npy else folder / "features"
        whole = np.lib.format.open_memmap(where, "w+", np.float32, shape)
        first = 0
        for part in opened:
            whole[first : first + len(part)] = part
            first += len(part)
        whole.flush()
        if not is_npy:
            save_file({"features": torch.from_numpy(whole)}, written)
