"""Samplers and loaders: which rank loads which images in which order.

The order of an epoch depends on the seed and the epoch only, and ranks take its images in turn. The
augmentation of an image depends on seed, epoch and index. So a run can resume inside an epoch, with
any world size and number of workers, at `position`: the images that all ranks have used.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from config.flags import DataConfig
from input_pipeline.image_sets import Images, ImageSet, ImageStream, Sample
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import DistributedContext, shard
from runtime.errors import UserError
from runtime.signals import end_workers_at_exit, ignore_signals_in_worker, signals_blocked
from utils import seed_everything, seed_host, stream_seed

UNREADABLE = -1  # label of an unreadable image


class TrainImages(Dataset[Sample]):
    """Images whose augmentation depends on seed, epoch and index only.

    An unreadable image is listed, and replaced by another of its class, chosen likewise.
    """

    def __init__(
        self, images: ImageSet, seed: int, unreadable: UnreadableImages, epoch: int = 0
    ) -> None:
        self.images, self.seed, self.unreadable, self.epoch = images, seed, unreadable, epoch

    def __getitem__(self, index: int) -> Sample:
        seed_host(stream_seed("image", self.seed, self.epoch, index))
        for candidate in self._candidates(index):
            try:
                return self.images[candidate]
            except UserError as error:
                self.unreadable.add(self.images.name(candidate), str(error))
        raise UserError(
            f"neither {self.images.name(index)} nor another image of its class can be read; "
            f"see {self.unreadable.path}"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        labels, every = self.images.labels, range(len(self.images))
        others = [i for i in every if labels is None or labels[i] == labels[index]]
        yield from random.sample(others, len(others))


class EvalImages(Dataset[Sample]):
    """Evaluation images; an unreadable one is blank, with the label UNREADABLE."""

    def __init__(self, images: ImageSet, unreadable: UnreadableImages) -> None:
        self.images, self.unreadable = images, unreadable

    def __getitem__(self, index: int) -> Sample:
        try:
            return self.images[index]
        except UserError as error:
            self.unreadable.add(self.images.name(index), str(error))
            return self.images.transform(Image.new("RGB", (256, 256))), UNREADABLE


@dataclass
class TrainLoader:
    """Shuffled full batches of this rank, one epoch at a time."""

    images: Images
    config: DataConfig
    context: DistributedContext
    unreadable: UnreadableImages
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.images, ImageStream):
            self.images.prepare(self.config.num_workers, share=True, unreadable=self.unreadable)

    def batches(self, epoch: int, position: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of an epoch after `position`.

        Of streams, the batches up to `position` are read and discarded; with the same world size
        and number of workers, that repeats the order of an uninterrupted run.
        """
        images, config, context, self.epoch = self.images, self.config, self.context, epoch
        options: dict[str, Any] = {"batch_size": config.batch_size, "drop_last": True}
        if isinstance(images, ImageStream):
            # for the random numbers of its workers
            seed_everything(stream_seed("epoch", self.seed, epoch, context.rank))
            images.set_epoch(epoch)
            loader = _loader(images, images, config, context, **options)
            return islice(loader, position // (config.batch_size * context.world_size), None)
        source = TrainImages(images, self.seed, self.unreadable, epoch)
        options["sampler"] = self._order()[position + context.rank :: context.world_size]
        return iter(_loader(images, source, config, context, **options))

    def _order(self) -> list[int]:
        """Return the indices of all images in the order of the epoch."""
        # no other seed has this order in one of its first 100,000 epochs
        generator = torch.Generator().manual_seed(100_000 * self.seed + self.epoch)
        return torch.randperm(self.images.length, generator=generator).tolist()

    def names_of_step(self, total_batch: int, position: int, steps_since: int) -> list[str]:
        """Return the images, of all ranks, of the step `steps_since` steps before `position`.

        Empty for a step of an earlier epoch, or of a stream.
        """
        start = position - steps_since * total_batch
        if start < 0 or isinstance(self.images, ImageStream):
            return []
        return [self.images.name(i) for i in self._order()[start : start + total_batch]]


def eval_loader(
    images: Images,
    config: DataConfig,
    context: DistributedContext,
    unreadable: UnreadableImages,
    dist_eval: bool = True,
) -> DataLoader:
    """Load all images once: each rank its `shard`, or all of them without dist_eval.

    Of a stream each rank loads all images: timm's readers would repeat or miss some if the shards
    don't divide evenly.
    """
    batch_size = int(1.5 * config.batch_size)
    if isinstance(images, ImageStream):
        images.prepare(config.num_workers, share=False, unreadable=unreadable)
        return _loader(images, images, config, context, batch_size=batch_size)
    rank, world_size = (context.rank, context.world_size) if dist_eval else (0, 1)
    indices = shard(len(images), batch_size, rank, world_size)
    source = EvalImages(images, unreadable)
    return _loader(images, source, config, context, batch_size=batch_size, sampler=indices)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn torch's error for a killed loader worker into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a loader worker was killed, perhaps for lack of memory: lower --num_workers; {error}"
        ) from None


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        with signals_blocked():
            return super().__iter__()


def _loader(
    images: Images, source: Dataset, config: DataConfig, context: DistributedContext, **options: Any
) -> DataLoader:
    if config.num_workers:
        end_workers_at_exit()
    # workers aren't persistent: their random numbers depend on the epoch's seed
    return _Loader(
        source,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and context.device.type == "cuda",
        multiprocessing_context="fork" if images.needs_fork and config.num_workers else None,
        worker_init_fn=ignore_signals_in_worker,
        **options,
    )
