"""What a data set has to provide: `ImageSet` for numbered images, `ImageStream` for streams.

To add a data format, write a subclass of one of them and open it in datasets.py.
"""

import logging
from collections.abc import Iterable, Iterator
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

Sample = tuple[torch.Tensor, int]
"""A transformed image (3, H, W) and its label."""


class ImageSet(Dataset[Sample]):
    """Images with a number each.

    Args:
        transform: Image -> tensor (3, H, W).
        classes: The names of the classes in the order of the labels.
        labels: The label of each image, or None where only reading the images tells.
    """

    needs_fork = False
    """Whether loader workers have to be forked, whatever the platform's default is."""

    def __init__(self, transform: Any, classes: list[str], labels: Iterable[int] | None) -> None:
        self.transform, self.classes = transform, classes
        self.labels = None if labels is None else [int(label) for label in labels]

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def length(self) -> int:
        return len(self)

    def read(self, index: int) -> tuple[Any, int]:
        """The image as the transform takes it, and its label; UserError for an unreadable one."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The file of an image, or its number where it has none."""
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.read(index)
        return self.transform(image), label


class ImageStream(IterableDataset[Sample]):
    """Images that are read from their beginning, without names or numbers.

    Args:
        classes: The names of the classes in the order of the labels.
        length: How many images make an epoch, in all processes together.
    """

    needs_fork = False
    """As of an ImageSet."""

    def __init__(self, classes: list[str], length: int) -> None:
        self.classes, self.length = classes, length

    def __iter__(self) -> Iterator[Sample]:
        """This rank's and loader worker's share."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as that epoch asks."""

    def prepare(self, num_workers: int, share: bool, unreadable: UnreadableImages) -> None:
        """Called once before loading.

        Args:
            num_workers: Loader workers per rank.
            share: Share the images among the ranks, or give each rank all of them.
            unreadable: Where images that cannot be read are listed.
        """


class FolderImages(ImageSet):
    """The files that torchvision has found in class folders."""

    def __init__(self, found: ImageFolder, transform: Any, classes: list[str]) -> None:
        super().__init__(transform, classes, found.targets)
        self.folder, self.files = Path(found.root), [path for path, _ in found.samples]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Any, int]:
        # a transform that crops first takes JPEGs that are not decoded yet
        load = load_lazily if crops_fast(self.transform) else load_image
        assert self.labels is not None
        return load(self.files[index]), self.labels[index]

    def name(self, index: int) -> str:
        return self.files[index]


def open_folder(folder: Path, transform: Any) -> FolderImages:
    """One folder per class below `folder`; raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    try:
        found = ImageFolder(str(folder), is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has to hold one folder of images per class: {str(error).splitlines()[0]}"
        ) from None
    return FolderImages(found, transform, found.classes)


class TorchvisionImages(ImageSet):
    """A data set of torchvision, opened without a transform."""

    def __init__(self, source: Any, transform: Any, classes: list[str]) -> None:
        labels = getattr(source, "targets", None)
        super().__init__(
            transform, classes, None if labels is None else [int(label) for label in labels]
        )
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Any, int]:
        with readable(self.name(index)):
            return self.source[index]


class Part(ImageSet):
    """Some images of a set."""

    def __init__(self, whole: ImageSet, indices: list[int]) -> None:
        labels = whole.labels
        chosen = None if labels is None else [labels[index] for index in indices]
        super().__init__(whole.transform, whole.classes, chosen)
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Any, int]:
        return self.whole.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])


def spread_evenly(images: ImageSet, most: int | None) -> ImageSet:
    """At most that many images, evenly out of the set."""
    if most is None or most >= len(images):
        return images
    return Part(images, [i * len(images) // most for i in range(most)])


def held_out(images: FolderImages, fraction: float) -> dict[str, list[int]]:
    """The indices of 'train' and 'val': of each class a fraction, drawn with a fixed seed.

    Raises:
        UserError: a class has too few images.
    """
    chosen: dict[str, list[int]] = {"train": [], "val": []}
    labels = np.array(images.labels)
    for label, name in enumerate(images.classes):
        indices = np.random.RandomState(0).permutation(np.flatnonzero(labels == label))
        count = max(1, round(fraction * len(indices)))
        if count == len(indices):
            raise UserError(
                f"{images.folder}/{name} holds {len(indices)} image(s): --val_fraction {fraction} "
                "leaves none to train on"
            )
        chosen["val"] += indices[:count].tolist()
        chosen["train"] += indices[count:].tolist()
    logger.info("%d of the %d images of %s are held out for evaluation",
                len(chosen["val"]), len(labels), images.folder)  # fmt: skip
    return {part: sorted(indices) for part, indices in chosen.items()}
