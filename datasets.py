"""build_data: opens the data sets that a run needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torchvision.datasets import CIFAR100

from config.flags import AugmentConfig, DataConfig
from input_pipeline import image_sets
from input_pipeline.digits import write_digits
from input_pipeline.image_sets import Images, ImageSet, open_folder
from input_pipeline.timm_sets import PREFIXES, open_timm_set
from input_pipeline.transforms import eval_transform, mean_std, train_transform
from runtime.distributed import SINGLE_PROCESS, DistributedContext, first_on_each_machine
from runtime.errors import UserError

FOLDERS = ("IMNET", "image_folder", "digits")
"""Values of --data_set with one folder per class."""


@dataclass(frozen=True)
class Data:
    """The data sets of a run, and its class names in the order of the labels."""

    train: Images | None
    val: Images | None
    classes: list[str]


def build_data(
    config: DataConfig,
    augment: AugmentConfig,
    input_size: int,
    with_train: bool = True,
    with_val: bool = True,
) -> Data:
    """Open the data sets that a run needs; UserError if one is missing or empty."""
    prefix = config.data_set.partition("/")[0]
    if prefix not in (*FOLDERS, "CIFAR", "tar", *PREFIXES):
        raise UserError(
            f"--data_set {config.data_set}: choose one of {', '.join(FOLDERS)}, CIFAR, tar, or one "
            f"of timm's: {', '.join(name + '/' for name in PREFIXES)}"
        )
    if not Path(config.data_path).is_dir() and (config.has_path or prefix not in ("hfds", "hfids")):
        raise UserError(f"--data_path {config.data_path} is not a folder")
    mean, std = mean_std(config)
    transforms: dict[str, Any] = {}
    if with_train:
        transforms["train"] = train_transform(augment, input_size, mean, std)
    if with_val:
        transforms["val"] = eval_transform(input_size, mean, std, augment.crop_pct)
    parts: dict[str, Images]
    if prefix in FOLDERS:
        parts = {**_open_folders(config, transforms)}
    else:
        open_part = _open_cifar if prefix == "CIFAR" else open_timm_set
        parts = {part: open_part(config, part, transform) for part, transform in transforms.items()}
    classes = _common_classes(config, parts)
    for part, images in parts.items():
        if isinstance(images, ImageSet):  # streams are opened with max_images
            parts[part] = image_sets.spread_evenly(images, config.max_images)
    return Data(parts.get("train"), parts.get("val"), classes)


def fetch_data(config: DataConfig, context: DistributedContext = SINGLE_PROCESS) -> None:
    """Download or write to data_path, once per machine, the data sets that need no preparation."""
    name, path = config.data_set, config.data_path
    if name not in ("digits", "CIFAR") and not name.startswith("torch/"):
        return
    if not config.has_path:
        raise UserError(f"--data_set {name} needs a folder: give --data_path FOLDER")
    with first_on_each_machine(context):
        try:
            if name == "digits":
                write_digits(Path(path))
            elif name == "CIFAR":
                CIFAR100(path, download=True)
            else:
                for split in (config.train_split, config.val_split):
                    create_dataset(name, root=path, split=split, download=True)
        except (OSError, RuntimeError, AssertionError) as error:
            by_hand = f"; or put {CIFAR100.url} there yourself" if name == "CIFAR" else ""
            what = f"--data_set {name} cannot be stored in --data_path {path}"
            raise UserError(f"{what}: {error}{by_hand}") from None


def _open_folders(config: DataConfig, transforms: dict[str, Any]) -> dict[str, ImageSet]:
    root = Path(config.data_path)
    train, val = root / "train", root / "val"
    if config.data_set == "image_folder" and config.eval_data_path:
        train, val = root, Path(config.eval_data_path)
    elif config.data_set == "image_folder":
        train, val = (folder if folder.is_dir() else root for folder in (train, val))
        if config.val_fraction and val == root:
            opened = {part: open_folder(train, transform) for part, transform in transforms.items()}
            chosen = image_sets.held_out(next(iter(opened.values())), config.val_fraction)
            return {part: image_sets.Part(images, chosen[part]) for part, images in opened.items()}
        if len(transforms) == 2 and root in (train, val):
            raise UserError(
                f"no evaluation images: {root} does not hold both train/ and val/, so give "
                "--eval_data_path FOLDER, --val_fraction 0.2, or --disable_eval true"
            )
    folders = {"train": train, "val": val}
    return {part: open_folder(folders[part], transform) for part, transform in transforms.items()}


def _open_cifar(config: DataConfig, part: str, transform: Any) -> ImageSet:
    try:
        source = CIFAR100(config.data_path, train=part == "train")
    except RuntimeError as error:
        raise UserError(f"--data_path {config.data_path} has no CIFAR-100: {error}") from None
    return image_sets.TorchvisionImages(source, transform, source.classes)


def _common_classes(config: DataConfig, parts: dict[str, Images]) -> list[str]:
    """Return the classes of all parts; UserError if they differ or don't fit --data_set."""
    path, known = config.data_path, {part: images.classes for part, images in parts.items()}
    if len(known) == 2 and known["train"] != known["val"]:
        train, val = set(known["train"]), set(known["val"])
        raise UserError(
            f"{path}: training and evaluation images have different classes: only in training "
            f"{_some(train - val)}, only in evaluation {_some(val - train)}"
        )
    classes = next(iter(known.values()))
    if "train" in parts and len(classes) < 2:
        raise UserError(f"{path} has a single class, {classes[0]}: give two or more")
    if config.data_set == "digits" and classes != list("0123456789"):
        raise UserError(f"--data_path {path} has other images than digits: give a new folder")
    if config.data_set == "IMNET" and len(classes) != 1000:
        raise UserError(
            f"{path} has {len(classes)} classes, ImageNet-1K has 1000: use --data_set image_folder "
            "for other data"
        )
    return classes


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "none"
