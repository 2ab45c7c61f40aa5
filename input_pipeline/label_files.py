"""Images with several labels each: train.csv and val.csv, or .json, beside the images."""

import csv
import json
import logging
import os
import unicodedata
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from input_pipeline.image_sets import UNREADABLE, ListedImages
from input_pipeline.images import Decoding
from input_pipeline.listing import Listing
from runtime.errors import UserError, reason_of

logger = logging.getLogger(__name__)

SEPARATOR = ";"  # between the classes of an image


class MultiLabelImages(ListedImages):
    """Images whose labels are multi-hot, float32 (classes): 1 for each class of the image."""

    def __init__(self, listing: Listing, transform: Any, decoding: Decoding) -> None:
        super().__init__(listing, transform, decoding)
        self.labels = None  # there is no single one

    def read(self, index: int) -> tuple[Any, torch.Tensor]:
        target = torch.zeros(len(self.classes))
        for label in self.source.labels_of(index).tolist():
            target[self.numbered(label)] = 1
        return self.load(index), target

    def all_labels(self) -> torch.Tensor:
        numbers = torch.tensor([self.numbered(i) for i in range(len(self.source.classes))])
        return numbers[self.source.labels.long()]

    @property
    def no_label(self) -> torch.Tensor:
        return torch.full((len(self.classes),), float(UNREADABLE))


def list_labelled(folder: Path, part: str) -> Listing:
    """List the images of folder/part.csv or part.json, whose paths are relative to the folder.

    A CSV file has a header. Its first column is the file; either another column, `labels`, names
    the classes, separated by ';', or there is a column of 0 and 1 for each class. A JSON file is an
    object: file -> list of class names. Classes are sorted, or in the order of their columns.
    Images may have none of them. Raises UserError for a file that is missing or wrong.
    """
    found = [path for path in (folder / f"{part}.csv", folder / f"{part}.json") if path.is_file()]
    if len(found) != 1:
        what = f"both {part}.csv and" if found else f"neither {part}.csv nor"
        raise UserError(f"--data_set multi_label: {folder} has {what} {part}.json")
    path = found[0]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            read = _rows_of_csv if path.suffix == ".csv" else _rows_of_json
            classes, rows = read(file, str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: save it as UTF-8 ({error.reason})") from None
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
    bad = [name for name in classes if SEPARATOR in name]
    if bad:
        raise UserError(f"{path}: the class {bad[0]!r} has a {SEPARATOR} in its name")
    odd = [name for name in classes if "|" in name or "," in name]
    if odd and all(len(own) < 2 for own in rows.values()):
        logger.warning("%s: %r is one class; classes are separated by %s", path, odd[0], SEPARATOR)
    numbers = {name: number for number, name in enumerate(classes)}
    text, ends, labels, label_ends = bytearray(), array("q"), array("i"), array("q")
    for name, own in rows.items():
        text += os.fsencode(name)
        ends.append(len(text))
        labels.extend(sorted(numbers[label] for label in own))
        label_ends.append(len(labels))
    if not rows:
        raise UserError(f"{path} names no images")
    if not labels:
        raise UserError(f"{path}: no image has a label")
    first = folder / next(iter(rows))
    if not first.is_file():
        raise UserError(f"{path}: there is no file {str(first)!r}: paths are relative to {folder}")
    return Listing(
        str(folder), classes, torch.frombuffer(text, dtype=torch.uint8),
        torch.frombuffer(ends, dtype=torch.int64), torch.frombuffer(labels, dtype=torch.int32), {},
        label_ends=torch.frombuffer(label_ends, dtype=torch.int64),
    )  # fmt: skip


Rows = dict[str, set[str]]  # file -> its classes


def _rows_of_csv(file: Any, path: str) -> tuple[list[str], Rows]:
    lines = csv.reader(file, strict=True)
    header = [_clean(name) for name in next(lines, [])]
    columns = header[1:]
    if not columns:
        raise UserError(f"{path}: its header needs two columns or more, file and labels")
    is_named = "labels" in columns
    if not is_named and len({*columns}) < len(columns):
        raise UserError(f"{path}: two columns have the same name")
    place, rows = columns.index("labels") if is_named else -1, Rows()
    for number, line in _with_numbers(lines, path, len(header)):
        name, values = line[0].strip(), line[1:]
        if name in rows:
            raise UserError(f"{path}, line {number}: {name} occurs a second time")
        if is_named:
            rows[name] = {_clean(label) for label in values[place].split(SEPARATOR)} - {""}
            continue
        wrong = {*values} - {"0", "1"}
        if wrong:
            raise UserError(
                f"{path}, line {number}: {sorted(wrong)[0]!r} is neither 0 nor 1; or name the "
                f"column labels, and separate the classes by {SEPARATOR}"
            )
        rows[name] = {label for label, value in zip(columns, values, strict=True) if value == "1"}
    return (sorted(set().union(*rows.values())) if is_named else columns), rows


def _with_numbers(lines: Any, path: str, columns: int) -> Iterator[tuple[int, list[str]]]:
    for line in lines:
        if not line:
            continue
        if len(line) != columns:
            raise UserError(
                f"{path}, line {lines.line_num}: {len(line)} columns, the header has {columns}"
            )
        if not line[0].strip():
            raise UserError(f"{path}, line {lines.line_num}: no file is named")
        yield lines.line_num, line


def _rows_of_json(file: Any, path: str) -> tuple[list[str], Rows]:
    content = json.load(file, object_pairs_hook=partial(_without_doubles, path=path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object, file -> list of class names")
    for name, labels in content.items():
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise UserError(f"{path}: {name} has no list of class names")
    rows = {name: {_clean(label) for label in labels} - {""} for name, labels in content.items()}
    return sorted(set().union(*rows.values())), rows


def _without_doubles(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {twice} occurs a second time")
    return found


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())
