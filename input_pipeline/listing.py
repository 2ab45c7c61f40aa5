"""The images of a data set as a few arrays, listed by one process per machine."""

import hashlib
import logging
import os
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.distributed import DistributedContext, all_gather, shared_on_machine
from runtime.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """Images with their classes, as arrays that loader workers share.

    They take 12 bytes per image in addition to the paths, in tar files 36.

    Args:
        root: Folder that the paths are relative to.
        classes: Class names in the order of the labels.
        text: All paths, one after another, uint8.
        ends: The end of each path in `text`, int64 (N).
        labels: int32 (N); with several labels per image, those of all images, one after another.
        skipped: Number of files that are not images, by kind.
        tars: Tar files that hold the images, if any.
        places: Number of the tar file, offset and size of each image, int64 (N, 3).
        label_ends: With several labels per image, the end of its labels in `labels`, int64 (N).
    """

    root: str
    classes: list[str]
    text: Tensor
    ends: Tensor
    labels: Tensor
    skipped: dict[str, int]
    tars: list[str] = field(default_factory=list)
    places: Tensor | None = None
    label_ends: Tensor | None = None

    @classmethod
    def of(
        cls,
        root: str | Path,
        classes: list[str],
        images: Iterable[tuple[int, str]],
        skipped: dict[str, int],
        **places: Any,
    ) -> "Listing":
        """Build it from labels and paths; UserError if there are none."""
        text, lengths, labels = bytearray(), array("q"), array("i")
        for label, path in images:
            encoded = os.fsencode(path)
            text += encoded
            lengths.append(len(encoded))
            labels.append(label)
        if not labels:
            raise UserError(f"{root} needs one folder of images per class: it has no such images")
        ends = torch.frombuffer(lengths, dtype=torch.int64).cumsum(0)
        tensors = torch.frombuffer(text, dtype=torch.uint8), ends
        return cls(
            str(root), classes, *tensors, torch.frombuffer(labels, dtype=torch.int32), skipped,
            **places,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ends)

    def labels_of(self, index: int) -> Tensor:
        """Return the labels of an image that may have several."""
        if self.label_ends is None:
            return self.labels[index : index + 1]
        start = self.label_ends[index - 1] if index else 0
        return self.labels[start : self.label_ends[index]]

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.path(index)))

    @cached_property
    def _views(self) -> tuple[memoryview, np.ndarray]:
        # an item of these takes much less time than one of a tensor
        return self.text.numpy().data, self.ends.numpy()

    def __getstate__(self) -> dict[str, Any]:
        # tensors are shared with spawned processes, views would be copied
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def path(self, index: int) -> bytes:
        """Return the path of an image relative to the root."""
        index = range(len(self))[index]
        text, ends = self._views
        return bytes(text[ends[index - 1] if index else 0 : ends[index]])

    def chosen(self, indices: Tensor) -> "Listing":
        """Return the listing of some images of class folders."""
        images = ((int(self.labels[i]), os.fsdecode(self.path(i))) for i in indices.tolist())
        return Listing.of(self.root, self.classes, images, self.skipped)

    def paths(self) -> Iterator[bytes]:
        """Yield all paths relative to the root."""
        (text, ends), start = self._views, 0
        for end in map(int, ends):
            yield bytes(text[start:end])
            start = end

    def counts(self) -> Tensor:
        """Return the number of images per class."""
        return torch.bincount(self.labels, minlength=len(self.classes))


def listed_once(make: Callable[[], Listing], context: DistributedContext) -> Listing:
    """Return make() of one process per machine; UserError if machines find different images."""
    return compared(Listing(**shared_on_machine(lambda: make().__getstate__(), context)), context)


def compared(listing: Listing, context: DistributedContext) -> Listing:
    """Return the listing, and log what it skips; UserError if machines have different ones."""
    digest = hashlib.blake2b("\n".join(listing.classes).encode(errors="surrogateescape"))
    for tensor in (listing.text, listing.ends, listing.labels, listing.label_ends):
        if tensor is not None:
            digest.update(tensor.numpy().data)
    found = all_gather((len(listing), digest.digest()), context)
    if len(set(found)) > 1:
        counts = " and ".join(str(count) for count, _ in sorted(set(found)))
        raise UserError(f"{listing.root} differs between the machines: {counts} images")
    if listing.skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(listing.skipped.items()))
        logger.info("%s: skipped %s", listing.root, kinds)
    return listing


def held_out(listing: Listing, fraction: float) -> dict[str, Tensor]:
    """Return the indices of 'train' and of 'val', about `fraction` of the images.

    A hash of class and file name chooses, so other images that come or go move none from one side
    to the other, but a class keeps at least one image on each side. UserError for a class of one.
    """
    counts = listing.counts()
    for label in (counts == 1).nonzero().flatten().tolist():
        raise UserError(
            f"{listing.root}/{listing.classes[label]} has 1 image: --val_fraction {fraction} "
            "leaves none for training"
        )
    digests = b"".join(
        hashlib.blake2b(_in_nfc(path), digest_size=8).digest() for path in listing.paths()
    )
    hashes, labels = np.frombuffer(digests, dtype=">u8"), listing.labels.numpy()
    chosen = hashes < fraction * 2**64
    # in the order of the hashes within each class, the first is chosen and the last is not
    order = np.lexsort((hashes, labels))
    ends = np.cumsum(counts.numpy())
    present = counts.numpy() > 0
    chosen[order[(ends - counts.numpy())[present]]] = True
    chosen[order[(ends - 1)[present]]] = False
    return _split(torch.from_numpy(chosen))


def held_out_by_draw(listing: Listing, fraction: float) -> dict[str, Tensor]:
    """Like `held_out`, by the earlier rule: a fixed permutation of the images of each class.

    It knows the suffixes of that time only; other images are for training.
    """
    suffixes = tuple(b".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .gif".split())
    known = [i for i, path in enumerate(listing.paths()) if path.lower().endswith(suffixes)]
    chosen = torch.zeros(len(listing), dtype=torch.bool)
    for indices in torch.tensor(known).split(torch.bincount(listing.labels[known]).tolist()):
        if len(indices):
            count = max(1, round(fraction * len(indices)))
            chosen[np.random.RandomState(0).permutation(indices.numpy())[:count]] = True
    return _split(chosen)


def _split(chosen: Tensor) -> dict[str, Tensor]:
    parts = {"train": ~chosen, "val": chosen}
    return {part: mask.nonzero().flatten() for part, mask in parts.items()}


def _in_nfc(path: bytes) -> bytes:
    return path if path.isascii() else os.fsencode(unicodedata.normalize("NFC", os.fsdecode(path)))
