"""Predictions for many images: read by workers, told in order as they come, shared by processes."""

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from inference.classifier import Classifier
from inference.labels import as_unicode
from inference.preprocessing import Preprocessing
from input_pipeline.loaders import OnDevice, loader_of, naming_dead_workers
from runtime.distributed import DistributedContext, barrier, of_main
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
    """The classes that a classifier finds in an image file."""

    file: Path
    classes: list[tuple[str, float]] = field(default_factory=list)
    """The most probable ones, with their probabilities."""
    problem: str = ""
    """Why the image cannot be read; then there are no classes."""
    features: torch.Tensor | None = None
    """The input of the classifier's head, (num_features)."""


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
    """Return files, the problem of each or "", and the readable images (N, C, H, W).

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

    `precision` is that of autocast; a batch whose results are not finite is repeated in float32.
    """
    model, names, view = classifier.model.to(device), classifier.labels, classifier.preprocessing
    finish = OnDevice(view.transform, device)
    loader = loader_of(_Inputs(files, view), num_workers, batch_size=batch_size, collate_fn=_batch)
    for part, problems, images in _from_living_workers(loader):
        found: Iterator[Any] = iter(())
        if images is not None:
            inputs = finish(images)
            try:
                with naming_dead_workers():  # torch tells of them wherever this process is
                    with torch.autocast(device.type, precision, enabled=precision is not None):
                        logits, features = _outputs(model, inputs, with_features)
                    if precision and not logits.isfinite().all():
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


def _from_living_workers(loader: DataLoader) -> Iterator[Any]:
    with naming_dead_workers():
        yield from loader


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
    """Return float16 if it is exact enough on some images, spread over the files; else None.

    None is float32, also if the network cannot compute in float16.
    """
    model, images = classifier.model.to(device), []
    for file in files[:: -(-len(files) // 8)]:
        with suppress(UserError):  # told when it is predicted
            images.append(classifier.inputs([file]))
    if not images:
        return None
    inputs, shares = torch.cat(images).to(device), []
    with suppress(ValueError, RuntimeError, AssertionError):
        for enabled in (False, True):
            with torch.autocast(device.type, torch.float16, enabled=enabled):
                shares.append(classifier.probabilities(model(inputs).float()))
        if (shares[0] - shares[1]).abs().max() < EXACT:  # not of NaN
            return torch.float16
    return None


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

    Nothing is written if no image is readable.

    `command` tells what `predict` depends on. The processes of `context` take parts of the files in
    turn. Parts that are done stay in the folder FILE.parts, so a command that was stopped goes on
    with the others.

    Args:
        output: FILE.csv or FILE.jsonl for the classes.
        features: FILE.npy or FILE.safetensors for float32 features (images, num_features). The
            image of each row is in `images_file`.
        tell: Gets the number of images done by this process.

    Raises UserError if a file is there already or cannot be written, or if FILE.parts is of other
    images or options.
    """
    target = output or features
    assert target is not None
    outputs = [path for path in (output, features) if path]
    outputs += [images_file(features)] if features else []
    folder = target.with_name(f"{target.name}.parts")
    starts = range(0, len(files), PER_PART)
    try:
        of_main(lambda: _begin(outputs, folder, _digest(command, files)), context)
        for number in range(context.rank, len(starts), context.world_size):
            own = files[starts[number] : starts[number] + PER_PART]
            part = folder / f"{number:06d}"
            if part.is_file():
                tell(len(own))
            else:
                _write_part(part, predict(own), output, tell)
        barrier()
        return _join(output, features, folder, files) if context.is_main else {}
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


def images_file(features: Path) -> Path:
    """Return the table of the images of a file of features."""
    return features.with_name(f"{features.name}.images.csv")


def _digest(command: str, files: list[Path]) -> str:
    digest = hashlib.blake2b(f"{command}\n".encode(errors="surrogateescape"))
    for file in files:
        digest.update(os.fsencode(file) + b"\n")
    return digest.hexdigest()


def _begin(outputs: list[Path], folder: Path, digest: str) -> None:
    if folder.exists():
        facts = folder / "command"
        if not facts.is_file() or facts.read_text() != digest:
            raise UserError(f"{folder} is of other images or options: remove it")
        return
    for path in outputs:
        if path.exists():
            raise UserError(f"{path} exists already: give another name")
    with written_whole(folder) as new:
        new.mkdir()
        (new / "command").write_text(digest)


def _write_part(
    part: Path, found: Iterable[Prediction], output: Path | None, tell: Callable[[int], None]
) -> None:
    """Write a line of facts, the text for `output`, and the features, in one file."""
    text, unreadable, rows = io.StringIO(), {}, []
    for index, one in enumerate(found):
        if one.problem:
            unreadable[index] = one.problem
        else:
            text.write(_line(output, one) if output else "")
        if one.features is not None:
            rows.append(one.features)
        tell(1)
    content = text.getvalue().encode(errors="surrogateescape")
    features = torch.stack(rows) if rows else torch.empty(0, 0)
    facts = {"unreadable": unreadable, "text": len(content), "features": [*features.shape]}
    with written_whole(part) as written, written.open("wb") as opened:
        opened.write(json.dumps(facts).encode() + b"\n" + content)
        opened.write(features.numpy().astype("<f4").tobytes())


def _line(output: Path, found: Prediction) -> str:
    if output.suffix == ".jsonl":
        classes = [
            {"class": as_unicode(name), "probability": share} for name, share in found.classes
        ]
        return json.dumps({"image": as_unicode(found.file), "predictions": classes}) + "\n"
    return csv_lines(found)


def csv_lines(found: Prediction) -> str:
    """Return the lines of a CSV file with COLUMNS."""
    return "".join(
        _csv_line((found.file, rank, name, f"{share:.4f}"))
        for rank, (name, share) in enumerate(found.classes, start=1)
    )


def _csv_line(values: tuple[Any, ...]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(values)  # so that it quotes both characters
    return line.getvalue().removesuffix("\r\n") + "\n"


def _join(
    output: Path | None, features: Path | None, folder: Path, files: list[Path]
) -> dict[str, str]:
    """Put the parts together, and remove them; return the unreadable images."""
    parts = [folder / f"{number:06d}" for number in range(-(-len(files) // PER_PART))]
    unreadable: dict[int, str] = {}
    texts, arrays = [], []  # a part, where it has them, and how many bytes
    rows = width = 0
    for number, part in enumerate(parts):
        with part.open("rb") as opened:
            facts, start = json.loads(opened.readline()), opened.tell()
        for index, problem in facts["unreadable"].items():
            unreadable[number * PER_PART + int(index)] = problem
        texts.append((part, start, facts["text"]))
        arrays.append((part, start + facts["text"], 4 * math.prod(facts["features"])))
        rows, width = rows + facts["features"][0], max(width, facts["features"][1])
    has_any = len(unreadable) < len(files)
    if output and has_any:
        with written_whole(output) as written, written.open("wb") as whole:
            if output.suffix == ".csv":
                whole.write((",".join(COLUMNS) + "\n").encode())
            for place in texts:
                _copy(*place, whole)
    if features and has_any:
        with written_whole(features) as written, written.open("wb") as whole:
            whole.write(_header(features, rows, width))
            for place in arrays:
                _copy(*place, whole)
        table = images_file(features)
        with (
            written_whole(table) as written,
            written.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text,
        ):
            text.write("image\n")
            text.writelines(_csv_line((f,)) for i, f in enumerate(files) if i not in unreadable)
    # a kill while the parts are being removed shall not leave some of them
    gone = folder.rename(folder.with_name(f".{folder.name}.done"))
    shutil.rmtree(gone)
    return {str(files[index]): problem for index, problem in unreadable.items()}


def _copy(part: Path, start: int, count: int, whole: BinaryIO) -> None:
    with part.open("rb") as opened:
        opened.seek(start)
        while count:
            piece = opened.read(min(count, 2**20))
            if not piece:
                raise OSError(f"{part} is cut off")
            whole.write(piece)
            count -= len(piece)


def _header(features: Path, rows: int, width: int) -> bytes:
    """Return what comes before the rows in a file of this format.

    Both formats are written by hand, since libraries want all rows in memory.
    """
    if features.suffix == ".npy":
        head = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(head, shape)
        return head.getvalue()
    tensor = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}
    text = json.dumps({"features": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
