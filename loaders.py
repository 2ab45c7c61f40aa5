"""Batches: who sees which images of a data set, in which order; and mixup."""

from collections.abc import Iterator

from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from config import DataConfig, MixupConfig
from datasets import image_count
from runtime.distributed import DistributedContext
from runtime.errors import UserError


class ShardSampler(Sampler[int]):
    """Every world_size-th index in order, without padding: each image stands in one shard."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def train_loader(
    dataset: Dataset, config: DataConfig, context: DistributedContext, seed: int = 0
) -> DataLoader:
    """Shuffled whole batches of this process's share; `set_epoch` reshuffles."""
    if isinstance(dataset, IterableDataset):
        _check_shards(dataset, config, context)
        return _loader(dataset, None, config.batch_size, config, context, drop_last=True)
    # the sampler adds the epoch to its seed: spaced out, no two seeds share an epoch's order
    sampler: DistributedSampler = DistributedSampler(
        dataset, context.world_size, context.rank, shuffle=True, seed=100_000 * seed
    )
    return _loader(dataset, sampler, config.batch_size, config, context, drop_last=True)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Shuffles a `train_loader` anew, alike in all processes."""
    shuffler = loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler
    shuffler.set_epoch(epoch)  # type: ignore[attr-defined]


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
    dataset: Dataset, config: DataConfig, context: DistributedContext, dist_eval: bool = True
) -> DataLoader:
    """All images once: shared among the processes, or all of them for each process."""
    batch_size = int(1.5 * config.batch_size)
    if isinstance(dataset, IterableDataset):
        # timm's readers would repeat or miss images where shards do not divide evenly
        reader = dataset.reader  # type: ignore[attr-defined]
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        return _loader(dataset, None, batch_size, config, context, drop_last=False)
    rank, world_size = (context.rank, context.world_size) if dist_eval else (0, 1)
    sampler = ShardSampler(image_count(dataset), rank, world_size)
    return _loader(dataset, sampler, batch_size, config, context, drop_last=False)


def _loader(
    dataset: Dataset,
    sampler: Sampler | None,
    batch_size: int,
    config: DataConfig,
    context: DistributedContext,
    drop_last: bool,
) -> DataLoader:
    # a process started otherwise would take our datasets.py for Hugging Face's package
    forks = config.num_workers > 0 and config.data_set.startswith(("hfds/", "hfids/"))
    if hasattr(dataset, "set_loader_cfg"):
        dataset.set_loader_cfg(num_workers=config.num_workers)
    # workers are started anew each epoch, so that their random streams follow from the epoch's
    # seed alone and a resumed run sees what an undisturbed one would have seen
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and context.device.type == "cuda",
        drop_last=drop_last,
        multiprocessing_context="fork" if forks else None,
    )


def build_mixup(config: MixupConfig, smoothing: float, num_classes: int) -> Mixup | None:
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
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
