"""Samplers and loaders: which rank loads which images in which order.

The order of an epoch depends on the seed and the epoch only, and ranks take its images in turn. The
augmentation of an image depends on seed, epoch and index; only random erasing, which whole batches
take on their device, depends on the batch and the rank. So a run can resume inside an epoch, with
any world size and number of workers, at `position`: the images that all ranks have used.
"""

import copy
import functools
import gc
import logging
import math
import multiprocessing
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from config.flags import DataConfig, SamplingConfig
from input_pipeline.image_sets import Images, ImageSet, ImageStream, Sample, labels_of
from input_pipeline.transforms import SizeSchedule
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import DistributedContext, shard
from runtime.errors import UserError
from runtime.signals import end_workers_at_exit, ignore_signals, signals_blocked
from utils import cpu_cores, seed_everything, seed_host, stream_seed

logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]  # images (N, C, H, W) and labels, (N) or (N, classes)


class TrainImages(Dataset[Sample]):
    """Images by (epoch, index), whose augmentation depends on seed, epoch and index only.

    Where an image may occur again in an epoch, a third number tells its occurrences apart.

    An unreadable image is listed, and replaced by another of its class, chosen likewise.
    """

    def __init__(self, images: ImageSet, seed: int, unreadable: UnreadableImages) -> None:
        self.images, self.seed, self.unreadable = images, seed, unreadable
        transform = getattr(images, "transform", None)
        self.sizes = transform if isinstance(transform, SizeSchedule) else None

    def __getitem__(self, item: tuple[int, ...]) -> Sample:
        epoch, index, *_ = item
        if self.sizes:
            self.sizes.epoch = epoch
        seed_host(stream_seed("image", self.seed, *item))
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
        labels, others = self.images.labels, list(range(len(self.images)))
        if labels is not None:
            others = (labels == labels[index]).nonzero().flatten().tolist()
        yield from random.sample(others, len(others))


class EvalImages(Dataset[Sample]):
    """Evaluation images; an unreadable one is blank, with the label(s) UNREADABLE."""

    def __init__(self, images: ImageSet, unreadable: UnreadableImages) -> None:
        self.images, self.unreadable = images, unreadable

    def __getitem__(self, index: int) -> Sample:
        try:
            return self.images[index]
        except UserError as error:
            self.unreadable.add(self.images.name(index), str(error))
            return self.images.blank(), self.images.no_label


class EpochOrder(Sampler[tuple[int, ...]]):
    """The images of this rank in an epoch after `position`, as `TrainImages` takes them.

    It is set before each epoch: loader workers live through all of them. UserError if
    --class_balanced needs labels that are not known.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        context: DistributedContext,
        config: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is immutable
    ) -> None:
        self.length, self.seed, self.context, self.config = images.length, seed, context, config
        self.labels = labels_of(images, "--class_balanced") if config.class_balanced else None
        self.epoch = self.position = 0

    def of_all_ranks(self) -> torch.Tensor:
        """Return the indices of all images in the order of the epoch."""
        # no other seed has this order in one of its first 100,000 epochs
        generator = torch.Generator().manual_seed(100_000 * self.seed + self.epoch)
        repeats = self.config.aug_repeats
        if self.labels is None:
            order = torch.randperm(self.length, generator=generator)
        else:
            order = draw_balanced(self.labels, math.ceil(self.length / repeats), generator)
        return order.repeat_interleave(repeats)[: self.length]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, start = self.epoch, self.position + self.context.rank
        places = range(start, self.length, self.context.world_size)
        own = self.of_all_ranks()[start :: self.context.world_size].clone()
        if self.config == SamplingConfig():
            return ((epoch, int(index)) for index in own.numpy())
        return (
            (epoch, int(index), place) for index, place in zip(own.numpy(), places, strict=True)
        )


def draw_balanced(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `count` indices of labels (N), with repetitions, of all classes equally many, to one.

    In each class the images are equally likely.
    """
    order = torch.randperm(count, generator=generator)
    counts = torch.bincount(labels)
    present = counts.nonzero().flatten()
    first = counts.cumsum(0) - counts
    by_class = labels.argsort(stable=True)
    # which classes have one image more is drawn, too
    extra = torch.randint(len(present), (), generator=generator)
    drawn = present[(order + extra) % len(present)]
    # float64, since in float32 a product could be rounded up to the next class
    within = torch.rand(count, generator=generator, dtype=torch.float64) * counts[drawn]
    return by_class[first[drawn] + within.long()]


class TrainLoader:
    """Shuffled full batches of this rank, one epoch at a time; the images on its device."""

    def __init__(
        self,
        images: Images,
        config: DataConfig,
        context: DistributedContext,
        unreadable: UnreadableImages,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is immutable
    ) -> None:
        self.images, self.context, self.seed = images, context, seed
        self.order = EpochOrder(images, seed, context, sampling)
        options: dict[str, Any] = {"batch_size": config.batch_size, "drop_last": True}
        if isinstance(images, ImageStream):
            if sampling.aug_repeats > 1:
                raise UserError("--aug_repeats: a stream cannot be read again for it")
            images.prepare(config.num_workers, share=True, unreadable=unreadable)
            # the random numbers of its workers depend on the seed at their start
            self.loader = _loader(images, images, config, context, persistent=False, **options)
        else:
            source = TrainImages(images, seed, unreadable)
            self.loader = _loader(images, source, config, context, sampler=self.order, **options)
        self.finish = OnDevice(images.transform, context.device)

    def batches(self, epoch: int, position: int) -> Iterator[Batch]:
        """Yield the batches of an epoch after `position`.

        Of streams, the batches up to `position` are read and discarded; with the same world size
        and number of workers, that repeats the order of an uninterrupted run.
        """
        self.order.epoch, self.order.position = epoch, position
        total_batch = self.loader.batch_size * self.context.world_size  # type: ignore[operator]
        batches: Iterable[Any] = self.loader
        if isinstance(self.images, ImageStream):
            seed_everything(stream_seed("epoch", self.seed, epoch, self.context.rank))
            self.images.set_epoch(epoch)
            batches = islice(self.loader, position // total_batch, None)
        for place, (images, labels) in zip(count(position, total_batch), batches, strict=False):
            if self.finish.erases:
                seed_everything(stream_seed("erase", self.seed, epoch, place, self.context.rank))
            yield self.finish(images), labels

    def names_of_step(self, total_batch: int, position: int, steps_since: int) -> list[str]:
        """Return the images, of all ranks, of the step `steps_since` steps before `position`.

        Empty for a step of an earlier epoch, or of a stream.
        """
        start = position - steps_since * total_batch
        if start < 0 or isinstance(self.images, ImageStream):
            return []
        indices = self.order.of_all_ranks()[start : start + total_batch].tolist()
        return [self.images.name(index) for index in indices]


def eval_loader(
    images: Images,
    config: DataConfig,
    context: DistributedContext,
    unreadable: UnreadableImages,
    dist_eval: bool = True,
) -> "FinishedBatches":
    """Load all images once: each rank its `shard`, or all of them without dist_eval.

    Of a stream each rank loads all images: timm's readers would repeat or miss some if the shards
    don't divide evenly.
    """
    batch_size = int(1.5 * config.batch_size)
    if isinstance(images, ImageStream):
        images.prepare(config.num_workers, share=False, unreadable=unreadable)
        loader = _loader(images, images, config, context, batch_size=batch_size)
        return FinishedBatches(loader, OnDevice(images.transform, context.device))
    rank, world_size = (context.rank, context.world_size) if dist_eval else (0, 1)
    indices = shard(len(images), batch_size, rank, world_size)
    source = EvalImages(images, unreadable)
    loader = _loader(images, source, config, context, batch_size=batch_size, sampler=indices)
    return FinishedBatches(loader, OnDevice(images.transform, context.device))


class OnDevice:
    """Takes batches (N, C, H, W) to a device, and finishes them there.

    Batches of a transform that is no `SplitTransform` only change the device.
    """

    def __init__(self, transform: Any, device: torch.device) -> None:
        # a copy, since the transform itself stays with the workers
        self.finish = copy.deepcopy(getattr(transform, "finish", nn.Identity())).to(device)
        self.device, erasing = device, getattr(self.finish, "erasing", None)
        self.erases = erasing is not None
        if erasing:
            erasing.device = device

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return self.finish(batch.to(self.device, non_blocking=True))


class FinishedBatches:
    """The batches of a loader, with their images (N, C, H, W) on a device."""

    def __init__(self, loader: DataLoader, finish: OnDevice) -> None:
        self.loader, self.finish = loader, finish
        self.batch_size = loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return ((self.finish(images), labels) for images, labels in self.loader)


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
    def check_worker_number_rationality(self) -> None:
        """Do nothing: loader_of tells it once, torch would for each loader and iterator."""

    def __iter__(self) -> Any:
        with signals_blocked():
            return super().__iter__()


def _start_worker(_: int) -> None:
    ignore_signals()
    gc.freeze()  # garbage collection would write to, and so copy, what is shared with the parent


@functools.cache
def _tell_of_cores(num_workers: int) -> None:
    if num_workers > (cores := cpu_cores()):
        logger.warning("%d loader workers are more than the %d CPU cores that this process may use",
                       num_workers, cores)  # fmt: skip


def loader_of(source: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """Return a loader whose workers leave signals to this process, and end with it."""
    if num_workers:
        _tell_of_cores(num_workers)
        end_workers_at_exit()
        # where workers are not forked, from Python 3.14 on, each would import these by itself
        multiprocessing.set_forkserver_preload(["torch", "torchvision", "timm.data"])
    return _Loader(source, num_workers=num_workers, worker_init_fn=_start_worker, **options)


def _loader(
    images: Images,
    source: Dataset,
    config: DataConfig,
    context: DistributedContext,
    persistent: bool = True,
    **options: Any,
) -> DataLoader:
    return loader_of(
        source,
        config.num_workers,
        persistent_workers=persistent and config.num_workers > 0,
        pin_memory=config.pin_mem and context.device.type == "cuda",
        multiprocessing_context="fork" if images.needs_fork and config.num_workers else None,
        **options,
    )
