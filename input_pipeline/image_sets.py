"""The interface of data sets: ImageSet for indexed images, ImageStream for streams.

To add a format, write a subclass and open it in datasets.py.
"""

from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from input_pipeline.images import AS_RELEASED, Decoding, load_image, load_lazily, readable
from input_pipeline.listing import Listing
from input_pipeline.transforms import crops_fast
from input_pipeline.unreadable import UnreadableImages
from runtime.errors import UserError, some

Sample = tuple[torch.Tensor, Any]  # transformed image (3, H, W); label, or multi-hot (classes)
UNREADABLE = -1  # label of an unreadable image


class ImageSet(Dataset[Sample]):
    """Images with an index.

    Args:
        source: What the images are read from, with a length.
        transform: Image -> tensor (3, H, W). Of a `SplitTransform` a sample has had the first part.
        classes: Class names in the order of the labels.
        labels: Label per image (N), if the source has no `targets`; None if only known after
            reading.
    """

    needs_fork = False  # whether loader workers have to be forked

    def __init__(self, source: Any, transform: Any, classes: list[str], labels: Any = None) -> None:
        self.source, self.transform, self.classes = source, transform, classes
        labels = getattr(source, "targets", labels)
        # a tensor is shared with loader workers, a list would be copied
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int32)
        self._numbers: list[int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def length(self) -> int:
        return len(self)

    def read(self, index: int) -> tuple[Any, Any]:
        """Return an image, as the transform takes it, and its label; UserError if unreadable."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the file of an image, or its index if it has none."""
        return str(index)

    def for_batch(self, image: Any) -> torch.Tensor:
        """Transform an image as far as it is done before images are put together."""
        return getattr(self.transform, "for_batch", self.transform)(image)

    def blank(self) -> torch.Tensor:
        """Return what takes the place of an unreadable image in a batch."""
        return self.for_batch(Image.new("RGB", (256, 256)))

    def all_labels(self) -> torch.Tensor | None:
        """Return the labels of all images, one after another; None if they are not known yet."""
        return self.labels

    @property
    def no_label(self) -> Any:
        """The label of `blank`."""
        return UNREADABLE

    def number_by(self, classes: list[str]) -> None:
        """Number the labels by `classes`, which include all classes of this set with images."""
        if classes != self.classes:
            numbers = {name: number for number, name in enumerate(classes)}
            self._numbers = [numbers.get(name, -1) for name in self.classes]
            if self.labels is not None:
                self.labels = torch.tensor(self._numbers, dtype=torch.int32)[self.labels]
            self.classes = classes

    def numbered(self, label: int) -> int:
        """Return a label of the source as a label of this set."""
        return self._numbers[label] if self._numbers else label

    def __getitem__(self, index: int) -> Sample:
        image, label = self.read(index)
        return self.for_batch(image), label


class ImageStream(IterableDataset[Sample]):
    """Images that can only be read from the start, without names.

    `classes` are in the order of the labels; `length` is the images per epoch, of all ranks;
    `transform` is that of an `ImageSet`.
    Subclasses define `__iter__`, which yields the samples of this rank and loader worker.
    """

    needs_fork = False

    def __init__(self, classes: list[str], length: int, transform: Any) -> None:
        self.classes, self.length, self.transform = classes, length, transform

    def number_by(self, classes: list[str]) -> None:
        """Refuse classes in another order than this stream's."""
        if classes != self.classes:
            raise UserError(
                f"the classes of this data set are in another order: {some(self.classes)} here, "
                f"{some(classes)} in the checkpoint or the training images"
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""

    def prepare(self, num_workers: int, share: bool, unreadable: UnreadableImages) -> None:
        """Called before loading; without `share` each rank gets all images.

        `num_workers` is per rank, and `unreadable` lists unreadable images.
        """


Images = ImageSet | ImageStream


def labels_of(images: Images, flag: str) -> torch.Tensor:
    """Return the labels (N); UserError, for the flag that needs them, if they are not known yet."""
    labels = getattr(images, "labels", None)
    if labels is None:
        raise UserError(f"{flag}: the labels of this data set are known only after reading it")
    return labels


class ListedImages(ImageSet):
    """The images of a listing, here files."""

    def __init__(self, listing: Listing, transform: Any, decoding: Decoding = AS_RELEASED) -> None:
        super().__init__(listing, transform, listing.classes, listing.labels)
        self.decoding = decoding

    def read(self, index: int) -> tuple[Any, Any]:
        return self.load(index), self.numbered(int(self.source.labels[index]))

    def blank(self) -> torch.Tensor:
        if self.decoding.as_array:
            return self.for_batch(torch.zeros(self.decoding.channels, 256, 256))
        return super().blank()

    def load(self, index: int) -> Any:
        # FastCrop takes JPEGs that are not decoded yet
        load = load_lazily if crops_fast(self.transform) else load_image
        return load(self.source[index], self.decoding)

    def name(self, index: int) -> str:
        return self.source[index]


class TorchvisionImages(ImageSet):
    """A data set of torchvision, opened without a transform."""

    def read(self, index: int) -> tuple[Any, int]:
        with readable(self.name(index)):
            image, label = self.source[index]
        return image, self.numbered(label)


class Part(ImageSet):
    """A subset of an ImageSet."""

    def __init__(self, whole: ImageSet, indices: torch.Tensor) -> None:
        labels = None if whole.labels is None else whole.labels[indices]
        super().__init__(indices, whole.transform, whole.classes, labels)
        self.whole, self.needs_fork = whole, whole.needs_fork

    def number_by(self, classes: list[str]) -> None:
        super().number_by(classes)
        self.whole.number_by(classes)

    def read(self, index: int) -> tuple[Any, Any]:
        return self.whole.read(int(self.source[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.source[index]))

    def blank(self) -> torch.Tensor:
        return self.whole.blank()

    @property
    def no_label(self) -> Any:
        return self.whole.no_label


def spread_evenly(images: ImageSet, most: int | None) -> ImageSet:
    """Return at most `most` images, spread evenly over the set."""
    if most is None or most >= len(images):
        return images
    return Part(images, torch.arange(most) * len(images) // most)
