"""Data sets, loaders and mixup."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.datasets import ImageFolder

from config import AugmentConfig, DataConfig, MixupConfig
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from transforms import eval_transform, mean_std, train_transform


@dataclass(frozen=True)
class Data:
    """The data sets of a run, and the names of its classes in the order of the labels."""

    train: ImageFolder | None
    val: ImageFolder | None
    classes: list[str]


def build_data(
    config: DataConfig,
    augment: AugmentConfig,
    input_size: int,
    with_train: bool = True,
    with_val: bool = True,
) -> Data:
    """Opens the folders that a run needs; raises UserError for one that is missing or empty."""
    if config.data_set == "digits":
        try:
            write_digits(Path(config.data_path))
        except OSError as error:
            raise UserError(f"--data_path {config.data_path} cannot be written: {error}") from None
    train_folder, val_folder = _folders(config, with_train, with_val)
    normalisation = mean_std(config)
    train = val = None
    if with_train:
        train = _image_folder(train_folder, train_transform(augment, input_size, *normalisation))
    if with_val:
        transform = eval_transform(input_size, *normalisation, crop_pct=augment.crop_pct)
        val = _image_folder(val_folder, transform)
    if train and val and train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"{train_folder} and {val_folder} hold different classes: {', '.join(only[:5])} "
            "stand in only one of them"
        )
    shown = train or val
    assert shown is not None, "a run trains or evaluates"
    if with_train and len(shown.classes) < 2:
        raise UserError(f"{shown.root} holds one class only, {shown.classes[0]}: give two or more")
    if config.data_set == "digits" and shown.classes != list("0123456789"):
        raise UserError(
            f"--data_path {config.data_path} holds other images than digits: give a new folder"
        )
    if config.data_set == "IMNET" and len(shown.classes) != 1000:
        raise UserError(
            f"{shown.root} holds {len(shown.classes)} classes, ImageNet-1K has 1000: "
            "use --data_set image_folder for other data"
        )
    return Data(train, val, shown.classes)


def _folders(config: DataConfig, with_train: bool, with_val: bool) -> tuple[Path, Path]:
    root = Path(config.data_path)
    if not root.is_dir():
        raise UserError(f"--data_path {root} is not a folder")
    if config.data_set != "image_folder":
        return root / "train", root / "val"
    if config.eval_data_path:
        return root, Path(config.eval_data_path)
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    train = root / "train" if has_train else root
    val = root / "val" if has_val else root
    if with_train and with_val and not (has_train and has_val):
        raise UserError(
            f"no evaluation images: {root} does not hold both train/ and val/, so give "
            "--eval_data_path FOLDER, or --disable_eval true"
        )
    return train, val


def _image_folder(folder: Path, transform: Any) -> ImageFolder:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    try:
        return ImageFolder(str(folder), transform, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has to hold one folder of images a class: {str(error).splitlines()[0]}"
        ) from None


def load_image(path: str) -> Image.Image:
    """An image file in RGB; raises UserError for one that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from None


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
    """Shuffled whole batches of this process's share; `loader.sampler.set_epoch` reshuffles."""
    # the sampler adds the epoch to its seed: spaced out, no two seeds share an epoch's order
    sampler: DistributedSampler = DistributedSampler(
        dataset, context.world_size, context.rank, shuffle=True, seed=100_000 * seed
    )
    return _loader(dataset, sampler, config.batch_size, config, context, drop_last=True)


def eval_loader(
    dataset: Dataset, config: DataConfig, context: DistributedContext, dist_eval: bool = True
) -> DataLoader:
    """All images once: shared among the processes, or all of them for each process."""
    length = len(dataset)  # type: ignore[arg-type]
    rank, world_size = (context.rank, context.world_size) if dist_eval else (0, 1)
    sampler = ShardSampler(length, rank, world_size)
    batch_size = int(1.5 * config.batch_size)
    return _loader(dataset, sampler, batch_size, config, context, drop_last=False)


def _loader(
    dataset: Dataset,
    sampler: Sampler,
    batch_size: int,
    config: DataConfig,
    context: DistributedContext,
    drop_last: bool,
) -> DataLoader:
    # workers are started anew each epoch, so that their random streams follow from the epoch's
    # seed alone and a resumed run sees what an undisturbed one would have seen
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and context.device.type == "cuda",
        drop_last=drop_last,
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


def write_digits(folder: Path, size: int = 32) -> None:
    """scikit-learn's 1,797 handwritten digits as image folders, if `folder` is not there yet.

    train/<digit>/*.png holds four fifths and val/<digit>/*.png a fifth, chosen once with a fixed
    seed and with the share of every class kept. The 8 x 8 scans are enlarged to `size` pixels.
    """
    if folder.exists():
        return
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(
        range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written beside and renamed: several processes may do this at once, and one may be killed
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    for part, indices in (("train", train), ("val", val)):
        for index in indices:
            target = temporary / part / str(digits.target[index])
            target.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((digits.images[index] * 255 / 16).round().astype("uint8"))
            scan.resize((size, size), Image.Resampling.BICUBIC).save(target / f"{index:04d}.png")
    temporary.chmod(0o755)
    try:
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
