"""Batches: who sees which images of a data set, in which order; and mixup."""

import atexit
import multiprocessing
import random
import signal
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from config import DataConfig, MixupConfig
from datasets import (
    BadImages,
    file_name,
    image_count,
    labels_of,
    note_damaged_shards,
    transform_of,
)
from runtime.distributed import DistributedContext, shard
from runtime.errors import UserError
from runtime.interrupts import SIGNALS
from utils import seed_host, stream_seed

UNREADABLE = -1


class EpochSampler(Sampler[int]):
    """A process's share of an epoch: every world_size-th image of a random order.

    The order follows from seed and epoch alone, so that any number of processes can go on at
    `position`, the number of images that have been used.
    """

    def __init__(self, length: int, seed: int, rank: int, world_size: int) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch = self.position = 0

    def order(self) -> list[int]:
        """The indices of all images, in the order of the epoch."""
        # spaced out, no two seeds share an epoch's order
        generator = torch.Generator().manual_seed(100_000 * self.seed + self.epoch)
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.position + self.rank :: self.world_size])

    def __len__(self) -> int:
        return len(range(self.position + self.rank, self.length, self.world_size))


class TrainImages(Dataset):
    """Images whose random augmentation follows from seed, epoch and index.

    So it does not depend on which process loads an image, nor on what that loaded before. An image
    that cannot be read is replaced by another of its class, chosen by the same random numbers.
    """

    def __init__(self, dataset: Dataset, seed: int, bad_images: BadImages) -> None:
        self.dataset, self.seed, self.bad_images = dataset, seed, bad_images
        self.labels = labels_of(dataset)
        self.epoch = 0

    def __getitem__(self, index: int) -> Any:
        seed_host(stream_seed("image", self.seed, self.epoch, index))
        try:
            return self.dataset[index]
        except UserError as error:
            self.bad_images.add(file_name(self.dataset, index), str(error))
        others = list(range(len(self)))
        if self.labels is not None:
            others = [i for i in others if self.labels[i] == self.labels[index]]
        for other in random.sample(others, len(others)):
            try:
                return self.dataset[other]
            except UserError as error:
                self.bad_images.add(file_name(self.dataset, other), str(error))
        raise UserError(
            f"neither {file_name(self.dataset, index)} nor another image of its class can be read; "
            f"see {self.bad_images.path}"
        )

    def __len__(self) -> int:
        return image_count(self.dataset)


class EvalImages(Dataset):
    """Images to evaluate on; one that cannot be read has the label UNREADABLE and is blank."""

    def __init__(self, dataset: Dataset, bad_images: BadImages) -> None:
        self.dataset, self.bad_images = dataset, bad_images

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UserError as error:
            self.bad_images.add(file_name(self.dataset, index), str(error))
            return transform_of(self.dataset)(Image.new("RGB", (256, 256))), UNREADABLE

    def __len__(self) -> int:
        return image_count(self.dataset)


class ShardSampler(Sampler[int]):
    """A process's `shard`: each image stands in one, and the batches are those of one process."""

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = shard(length, batch_size, rank, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def train_loader(
    dataset: Dataset,
    config: DataConfig,
    context: DistributedContext,
    bad_images: BadImages,
    seed: int = 0,
) -> DataLoader:
    """Shuffled whole batches of this process's share, an epoch at a time by `epoch_batches`."""
    if isinstance(dataset, IterableDataset):
        _check_shards(dataset, config, context)
        note_damaged_shards(bad_images)
        return _loader(dataset, None, config.batch_size, config, context, drop_last=True)
    sampler = EpochSampler(image_count(dataset), seed, context.rank, context.world_size)
    images = TrainImages(dataset, seed, bad_images)
    return _loader(images, sampler, config.batch_size, config, context, drop_last=True)


def epoch_batches(
    loader: DataLoader, epoch: int, position: int, world_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a `train_loader` in that epoch, after `position` images of all processes.

    A stream of images cannot begin in its middle: what comes before is read and left out, which
    repeats an undisturbed run if that had as many processes and workers.
    """
    if isinstance(loader.dataset, IterableDataset):
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        batch_size: int = loader.batch_size  # type: ignore[assignment]
        return islice(loader, position // (batch_size * world_size), None)
    assert isinstance(loader.sampler, EpochSampler)
    assert isinstance(loader.dataset, TrainImages)
    loader.sampler.epoch = loader.dataset.epoch = epoch
    loader.sampler.position = position
    return iter(loader)


def images_of_step(
    loader: DataLoader, total_batch: int, position: int, steps_since: int
) -> list[int]:
    """The indices that the step so many steps before `position` has used, in all processes.

    None for a step of an earlier epoch, or of a stream of images.
    """
    start = position - steps_since * total_batch
    if start < 0 or not isinstance(loader.sampler, EpochSampler):
        return []
    return loader.sampler.order()[start : start + total_batch]


def _ignore_signals(_: int) -> None:
    """A worker goes on where its whole group is told to stop: the last step wants its batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class _Loader(DataLoader):
    """Its workers inherit that SIGNALS wait, so that none ends one that cannot ignore them yet."""

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@cache
def _end_workers_at_exit() -> None:
    """Python ends its workers at exit by SIGTERM, which they ignore, and would wait for them."""
    atexit.register(_end_workers)


def _check_shards(dataset: Dataset, config: DataConfig, context: DistributedContext) -> None:
    """Refuses more loader processes than shards: some would have no images at all."""
    info = getattr(dataset.reader, "split_info", None)  # type: ignore[attr-defined]
    shards = getattr(info, "filenames", None)
    readers = context.world_size * max(1, config.num_workers)
    if shards is not None and len(shards) < readers:
        raise UserError(
            f"{len(shards)} shards cannot be shared by {readers} loader processes "
            f"({context.world_size} x --num_workers): lower --num_workers"
        )


def eval_loader(
    dataset: Dataset,
    config: DataConfig,
    context: DistributedContext,
    bad_images: BadImages,
    dist_eval: bool = True,
) -> DataLoader:
    """All images once: shared among the processes, or all of them for each process."""
    batch_size = int(1.5 * config.batch_size)
    if isinstance(dataset, IterableDataset):
        # timm's readers would repeat or miss images where shards do not divide evenly
        reader = dataset.reader  # type: ignore[attr-defined]
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        note_damaged_shards(bad_images)
        return _loader(dataset, None, batch_size, config, context, drop_last=False)
    rank, world_size = (context.rank, context.world_size) if dist_eval else (0, 1)
    sampler = ShardSampler(image_count(dataset), batch_size, rank, world_size)
    images = EvalImages(dataset, bad_images)
    return _loader(images, sampler, batch_size, config, context, drop_last=False)


def _loader(
    dataset: Dataset,
    sampler: Sampler | None,
    batch_size: int,
    config: DataConfig,
    context: DistributedContext,
    drop_last: bool,
) -> DataLoader:
    # a process started otherwise would take our datasets.py for Hugging Face's package
    forks = config.num_workers > 0 and config.data_set.startswith(("wds/", "hfds/", "hfids/"))
    source: Any = getattr(dataset, "dataset", dataset)
    if hasattr(source, "set_loader_cfg"):
        source.set_loader_cfg(num_workers=config.num_workers)
    if config.num_workers:
        _end_workers_at_exit()
    # workers are started anew each epoch: a stream's augmentation follows from the epoch's seed
    return _Loader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and context.device.type == "cuda",
        drop_last=drop_last,
        multiprocessing_context="fork" if forks else None,
        worker_init_fn=_ignore_signals,
    )


def build_mixup(config: MixupConfig, num_classes: int) -> Mixup | None:
    """timm's Mixup, which turns labels into smoothed soft targets; None where it is off."""
    if not config.enabled:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
