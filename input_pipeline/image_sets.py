"""The interface of data sets: ImageSet for indexed images, ImageStream for streams.

To add a format, write a subclass and open it in datasets.py.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from input_pipeline.images import is_image, load_image, load_lazily, readable
from input_pipeline.transforms import crops_fast
from input_pipeline.unreadable import UnreadableImages
from runtime.errors import UserError

logger = logging.getLogger(__name__)

Sample = tuple[torch.Tensor, int]  # transformed image (3, H, W), label


class ImageSet(Dataset[Sample]):
    """Images with an index.

    Args:
        source: What the images are read from, with a length.
        transform: Image -> tensor (3, H, W).
        classes: Class names in the order of the labels.
        labels: Label per image, if the source has no `targets`; None if only known after reading.
    """

    needs_fork = False  # whether loader workers have to be forked

    def __init__(self, source: Any, transform: Any, classes: list[str], labels: Any = None) -> None:
        self.source, self.transform, self.classes = source, transform, classes
        labels = getattr(source, "targets", labels)
        self.labels = None if labels is None else [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def length(self) -> int:
        return len(self)

    def read(self, index: int) -> tuple[Any, int]:
        """Return an image, as the transform takes it, and its label; UserError if unreadable."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the file of an image, or its index if it has none."""
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.read(index)
        return self.transform(image), label


class ImageStream(IterableDataset[Sample]):
    """Images that can only be read from the start, without names.

    `classes` are in the order of the labels; `length` is the images per epoch, of all ranks.
    Subclasses define `__iter__`, which yields the samples of this rank and loader worker.
    """

    needs_fork = False

    def __init__(self, classes: list[str], length: int) -> None:
        self.classes, self.length = classes, length

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""

    def prepare(self, num_workers: int, share: bool, unreadable: UnreadableImages) -> None:
        """Called before loading; without `share` each rank gets all images.

        `num_workers` is per rank, and `unreadable` lists unreadable images.
        """


Images = ImageSet | ImageStream


class FolderImages(ImageSet):
    """Image files found by torchvision in class folders."""

    def __init__(self, found: ImageFolder, transform: Any, classes: list[str]) -> None:
        super().__init__([path for path, _ in found.samples], transform, classes, found.targets)
        self.folder = Path(found.root)

    def read(self, index: int) -> tuple[Any, int]:
        # FastCrop takes JPEGs that are not decoded yet
        load = load_lazily if crops_fast(self.transform) else load_image
        assert self.labels is not None
        return load(self.source[index]), self.labels[index]

    def name(self, index: int) -> str:
        return self.source[index]


def open_folder(folder: Path, transform: Any) -> FolderImages:
    """Open a folder with one folder per class; UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    try:
        found = ImageFolder(str(folder), is_valid_file=is_image)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} needs one folder of images per class: {reason}") from None
    return FolderImages(found, transform, found.classes)


class TorchvisionImages(ImageSet):
    """A data set of torchvision, opened without a transform."""

    def read(self, index: int) -> tuple[Any, int]:
        with readable(self.name(index)):
            return self.source[index]


class Part(ImageSet):
    """A subset of an ImageSet."""

    def __init__(self, whole: ImageSet, indices: list[int]) -> None:
        labels = None if whole.labels is None else [whole.labels[index] for index in indices]
        super().__init__(indices, whole.transform, whole.classes, labels)
        self.whole, self.needs_fork = whole, whole.needs_fork

    def read(self, index: int) -> tuple[Any, int]:
        return self.whole.read(self.source[index])

    def name(self, index: int) -> str:
        return self.whole.name(self.source[index])


def spread_evenly(images: ImageSet, most: int | None) -> ImageSet:
    """Return at most `most` images, spread evenly over the set."""
    if most is None or most >= len(images):
        return images
    return Part(images, [i * len(images) // most for i in range(most)])


def held_out(images: FolderImages, fraction: float) -> dict[str, list[int]]:
    """Return indices for 'train' and 'val', a fixed draw per class; UserError if too few."""
    labels, val = np.array(images.labels), []
    for label, name in enumerate(images.classes):
        indices = np.random.RandomState(0).permutation(np.flatnonzero(labels == label))
        count = max(1, round(fraction * len(indices)))
        if count == len(indices):
            raise UserError(
                f"{images.folder}/{name} has {len(indices)} image(s): --val_fraction {fraction} "
                "leaves none for training"
            )
        val += indices[:count].tolist()
    logger.info("%d of the %d images of %s are held out for evaluation",
                len(val), len(labels), images.folder)  # fmt: skip
    return {"train": sorted(set(range(len(labels))) - set(val)), "val": sorted(val)}
