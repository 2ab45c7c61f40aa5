"""Data sets that timm reads: wds/, hfds/, hfids/, tfds/ and torch/."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.dataset import ImageDataset, IterableImageDataset
from torchvision.datasets import ImageFolder

from config.flags import DataConfig
from input_pipeline.hugging_face import import_hugging_face_datasets
from input_pipeline.image_sets import (
    Images,
    ImageSet,
    ImageStream,
    ListedImages,
    Sample,
    TorchvisionImages,
)
from input_pipeline.images import AS_RELEASED, decoded, readable
from input_pipeline.listing import Listing
from input_pipeline.packing import CLASSES
from input_pipeline.timm_patches import list_damaged_shards
from input_pipeline.unreadable import UnreadableImages
from runtime.errors import UserError, reason_of
from utils import numbered_classes

PREFIXES = ("wds", "hfds", "hfids", "tfds", "torch")


class ReaderImages(ImageSet):
    """The images of a timm reader, decoded as by the release."""

    def read(self, index: int) -> tuple[Any, int]:
        with readable(self.name(index)):
            file, label = self.source[index]
            return decoded(file, AS_RELEASED), self.numbered(label)

    def name(self, index: int) -> str:
        return str(self.source.filename(index) or index)


class ReaderStream(ImageStream):
    """The images of a streaming timm reader, whose labels are checked."""

    def __init__(self, source: IterableImageDataset, transform: Any, classes: list[str]) -> None:
        super().__init__(classes, int(source.reader.num_samples), transform)
        self.source = source
        source.transform = transform.for_batch

    def __iter__(self) -> Iterator[Sample]:
        for image, label in self.source:
            if not 0 <= label < len(self.classes):
                raise UserError(f"the label {label} is beyond --nb_classes {len(self.classes)}")
            yield image, label

    def set_epoch(self, epoch: int) -> None:
        self.source.set_epoch(epoch)

    def prepare(self, num_workers: int, share: bool, unreadable: UnreadableImages) -> None:
        list_damaged_shards(unreadable)
        self.source.set_loader_cfg(num_workers=num_workers)
        reader = self.source.reader
        if not share:
            reader.dist_rank, reader.dist_num_replicas = 0, 1
            return
        shards = getattr(getattr(reader, "split_info", None), "filenames", None)
        readers = reader.dist_num_replicas * max(1, num_workers)
        if shards is not None and len(shards) < readers:  # some would have no images
            raise UserError(
                f"{len(shards)} shards are too few for {readers} loader processes "
                f"({reader.dist_num_replicas} x --num_workers): lower --num_workers"
            )


def open_timm_set(config: DataConfig, part: str, transform: Any) -> Images:
    """Open 'train' or 'val' of a timm prefix; UserError if it can't be opened."""
    split = config.train_split if part == "train" else config.val_split
    prefix = config.data_set.partition("/")[0]
    try:
        if prefix in ("hfds", "hfids"):
            import_hugging_face_datasets()
        source: Any = create_dataset(
            config.data_set,
            root=config.data_path if config.has_path else None,
            split=split,
            is_training=part == "train",
            batch_size=config.batch_size,
            num_samples=config.max_images,
        )
    except ImportError as error:
        raise UserError(f"--data_set {config.data_set} needs a package: {error}") from None
    except Exception as error:  # each reader raises its own types
        reason = reason_of(error)
        if prefix == "wds":
            reason += f"; shards are named as in --{part}_split '{part}-{{000..099}}.tar|50000'"
        raise UserError(f"--data_set {config.data_set}, split {split}: {reason}") from None
    classes = _class_names(source) or _packed_classes(config) or numbered_classes(config.nb_classes)
    images: Images
    if isinstance(source, IterableImageDataset):
        images = ReaderStream(source, transform, classes)
    elif isinstance(source, ImageDataset):  # not used itself: it replaces unreadable images
        images = ReaderImages(source.reader, transform, classes)
    elif isinstance(source, ImageFolder):
        found = ((label, path) for path, label in source.samples)
        images = ListedImages(Listing.of("", classes, found, {}), transform)
    else:
        images = TorchvisionImages(source, transform, classes)
    # spawned workers would import this project's datasets.py instead of Hugging Face's package
    images.needs_fork = prefix in ("wds", "hfds", "hfids")
    return images


def _packed_classes(config: DataConfig) -> list[str]:
    """Return the class names that tools.pack has written beside shards."""
    file = Path(config.data_path) / CLASSES
    if not config.data_set.startswith("wds/") or not file.is_file():
        return []
    try:
        classes = os.fsdecode(file.read_bytes()).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {reason_of(error)}") from None
    if len(classes) != config.nb_classes:
        raise UserError(f"{file} names {len(classes)} classes: give --nb_classes {len(classes)}")
    return classes


def _class_names(source: Any) -> list[str]:
    """Return the class names in the order of the labels, if there are any."""
    source = getattr(source, "reader", source)
    index = getattr(source, "class_to_idx", None) or {}
    names = {label: str(name) for name, label in reversed(index.items())}
    return [names[label] for label in sorted(names)]
