"""build_data: opens the data sets that a run needs."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from torchvision.datasets import CIFAR100

from checkpoints.reading import numbered_as_saved
from checkpoints.sources import SavedRun
from config.flags import AugmentConfig, DataConfig
from input_pipeline.digits import write_digits
from input_pipeline.folders import folders_in, list_classes
from input_pipeline.image_sets import (
    Images,
    ImageSet,
    ImageStream,
    ListedImages,
    Part,
    TorchvisionImages,
    spread_evenly,
)
from input_pipeline.imagenet_sets import CLASSES, list_set, synsets
from input_pipeline.images import Decoding
from input_pipeline.label_files import MultiLabelImages, list_labelled
from input_pipeline.listing import Listing, held_out, held_out_by_draw, listed_once
from input_pipeline.parts import find_parts
from input_pipeline.tar_files import TarImages, list_tars
from input_pipeline.timm_sets import PREFIXES, open_timm_set
from input_pipeline.transforms import SizeSchedule, eval_transform, mean_std, train_transform
from runtime.distributed import (
    SINGLE_PROCESS,
    DistributedContext,
    first_on_each_machine,
    shared_on_machine,
)
from runtime.errors import UserError, some
from runtime.sizes import Size
from utils import are_names

logger = logging.getLogger(__name__)

FOLDERS = ("IMNET", "image_folder", "digits")
"""Values of --data_set with one folder per class."""


@dataclass(frozen=True)
class Data:
    """The data sets of a run, and the class names of its model in the order of the labels.

    To evaluate a checkpoint, `val` may have some of these classes only.
    """

    train: Images | None
    val: Images | None
    classes: list[str]


def check_data(config: DataConfig, with_train: bool = True, is_fetched: bool = True) -> None:
    """Raise UserError if --data_set has no such value, or --data_path is not a folder.

    Before `fetch_data` (`is_fetched` is False), folders that it creates may be missing.
    """
    prefix = config.data_set.partition("/")[0]
    if prefix not in (*FOLDERS, "CIFAR", "tar", "multi_label", *CLASSES, *PREFIXES):
        raise UserError(
            f"--data_set {config.data_set}: choose one of {', '.join(FOLDERS)}, CIFAR, tar, "
            "multi_label, to "
            f"evaluate also {', '.join(CLASSES)}, or one of timm's: "
            f"{', '.join(name + '/' for name in PREFIXES)}"
        )
    if prefix in CLASSES and prefix != config.data_set:
        raise UserError(
            f"--data_set {config.data_set}: give {prefix}, and the folder by --data_path"
        )
    if prefix in CLASSES and with_train:
        raise UserError(f"--data_set {prefix} is for evaluation: give --eval true and --resume")
    needs_folder = config.has_path or prefix not in ("hfds", "hfids")
    comes_later = not is_fetched and _is_fetchable(config.data_set)
    if needs_folder and not comes_later and not Path(config.data_path).is_dir():
        raise UserError(f"--data_path {config.data_path} is not a folder")


def _is_fetchable(data_set: str) -> bool:
    return data_set in ("digits", "CIFAR") or data_set.startswith("torch/")


def build_data(
    config: DataConfig,
    augment: AugmentConfig,
    input_size: Size,
    with_train: bool = True,
    with_val: bool = True,
    saved: SavedRun | None = None,
    context: DistributedContext = SINGLE_PROCESS,
    crops: bool = False,
) -> Data:
    """Open the data sets that a run needs.

    Evaluation images are larger for `crops` (--tta).
    `saved` is the checkpoint to evaluate or to resume: the labels are numbered as in it. Raises
    UserError if a data set is missing or empty, or has other classes than the checkpoint.
    """
    check_data(config, with_train)
    prefix = config.data_set.partition("/")[0]
    mean, std = mean_std(config)
    transforms: dict[str, Any] = {}
    if with_train:
        steps: list[tuple[int, Size]] = [*augment.size_steps] or [(0, input_size)]
        as_array = config.as_arrays
        by_epoch = {e: train_transform(augment, size, mean, std, as_array) for e, size in steps}
        transforms["train"] = SizeSchedule(by_epoch) if len(by_epoch) > 1 else by_epoch[0]
    if with_val:
        crop_pct = crop_pct_of(config, augment)
        transforms["val"] = eval_transform(input_size, mean, std, crop_pct, crops, config.as_arrays)
    parts: dict[str, Images]
    if prefix in FOLDERS:
        parts = {**_open_folders(config, transforms, context)}
    elif prefix == "tar":
        parts = {**_open_listed(config, transforms, context, _list_tars_of, TarImages)}
    elif config.is_multi_label:
        parts = {**_open_listed(config, transforms, context, list_labelled, MultiLabelImages)}
    elif prefix in CLASSES:
        listing = listed_once(partial(list_set, prefix, Path(config.data_path)), context)
        parts = {"val": ListedImages(listing, transforms["val"], decoding_of(config))}
    else:
        open_part = _open_cifar if prefix == "CIFAR" else open_timm_set
        parts = {part: open_part(config, part, transform) for part, transform in transforms.items()}
    # each process would read the same images
    for images in parts.values() if config.as_arrays and context.is_main else ():
        if isinstance(images, ImageSet):
            _warn_of_range(config, images)
    if augment.size_schedule and isinstance(parts.get("train"), ImageStream):
        raise UserError("--size_schedule: the images of a stream do not know their epoch")
    return numbered(config, parts, saved)


def _warn_of_range(config: DataConfig, images: ImageSet) -> None:
    """Warn if --value_range, or that of the files' type, does not seem to fit some images."""
    tops = []
    for index in range(0, len(images), max(1, len(images) // 8)):
        with suppress(UserError):  # told when it is used
            image = images.read(index)[0]
            tops.append((image.max().item(), (image == 1).float().mean().item()))
    if not tops:
        return
    largest, white = max(top for top, _ in tops), sum(share for _, share in tops) / len(tops)
    what = f"--value_range {config.value_range or 'of the type of the files'}"
    if white > 0.5:
        logger.warning("%s: %.0f%% of the pixels of some images are at its upper end", what,
                       100 * white)  # fmt: skip
    elif largest < 0.1:
        logger.warning("%s: no pixel of some images is above %.2g%% of it", what, 100 * largest)


def numbered(config: DataConfig, parts: dict[str, Images], saved: SavedRun | None) -> Data:
    """Number the labels of 'train' and 'val' alike, and shorten them to --max_images.

    Raises UserError if the classes do not fit each other, --data_set or the checkpoint.
    """
    classes = _common_classes(config, parts, saved)
    _check_classes(config, parts, classes)
    for part, images in parts.items():
        is_eval = "train" not in parts and saved is not None
        images.number_by(_evaluated(config, images, classes, saved) if is_eval else classes)
        _check_counts(config.data_path, part, images)
        if isinstance(images, ImageSet):  # streams are opened with max_images
            parts[part] = spread_evenly(images, config.max_images)
    sizes = ", ".join(
        f"{images.length} {'training' if part == 'train' else 'evaluation'} images"
        for part, images in parts.items()
    )
    logger.info("%d classes (%s): %s", len(classes), some(classes), sizes)
    return Data(parts.get("train"), parts.get("val"), classes)


def crop_pct_of(config: DataConfig, augment: AugmentConfig) -> float | None:
    """Return the crop_pct of evaluation images: 1 for ImageNet-C, whose images are centre crops."""
    is_cropped = config.data_set == "imagenet_c" and augment.crop_pct is None
    return 1.0 if is_cropped else augment.crop_pct


def decoding_of(config: DataConfig) -> Decoding:
    """Return how the image files of a data set are decoded: published ones as by the release."""
    turns = config.exif_orientation
    if turns is None:
        turns = config.data_set in ("image_folder", "tar", "multi_label")
    background = None if config.background == "none" else config.background
    return Decoding(turns, background, config.in_chans, config.value_range)


def fetch_data(config: DataConfig, context: DistributedContext = SINGLE_PROCESS) -> None:
    """Download or write to data_path, once per machine, the data sets that need no preparation."""
    name, path = config.data_set, config.data_path
    if not _is_fetchable(name):
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


def _open_folders(
    config: DataConfig, transforms: dict[str, Any], context: DistributedContext
) -> dict[str, ImageSet]:
    train, val = _find_folders(config, [*transforms])
    decoding = decoding_of(config)
    if train == val and config.val_fraction:
        listing = listed_once(partial(list_classes, train), context)
        choose = held_out if config.val_choice == "hash" else held_out_by_draw
        chosen = shared_on_machine(partial(choose, listing, config.val_fraction), context)
        logger.info("%d of the %d images of %s are held out for evaluation",
                    len(chosen["val"]), len(listing), train)  # fmt: skip
        return {
            part: Part(ListedImages(listing, transform, decoding), chosen[part])
            for part, transform in transforms.items()
        }
    opened: dict[str, ImageSet] = {}
    # an evaluation folder inside the training folder is not a class
    for part, folder, leave_out in (("train", train, val), ("val", val, None)):
        if part in transforms:
            listing = listed_once(partial(list_classes, folder, leave_out), context)
            opened[part] = ListedImages(listing, transforms[part], decoding)
    return opened


def _find_folders(config: DataConfig, wanted: list[str]) -> tuple[Path, Path]:
    """Return the folders of training and of evaluation images, the same one to share it.

    Raises UserError if a wanted one is missing or cannot be told.
    """
    root = Path(config.data_path)
    parts = find_parts(root, guesses="train" in wanted and not config.eval_data_path)
    if config.data_set != "image_folder":
        folders = {part: parts.get(part, root / part) for part in ("train", "val")}
        for part in wanted if config.data_set == "IMNET" else ():
            if not folders[part].is_dir():
                raise UserError(
                    f"--data_path {root} has no folder {part}/: give the folder that contains it, "
                    "or for class folders of your own --data_set image_folder --val_fraction 0.2"
                )
        return folders["train"], folders["val"]
    if config.eval_data_path:
        given = Path(config.eval_data_path)
        if not given.is_dir():
            raise UserError(f"--eval_data_path {given} is not a folder")
        for folder in parts.values() if "train" in wanted else ():
            is_class = (given / folder.name).is_dir()
            if not is_class and not folder.samefile(given):
                raise UserError(
                    f"--data_path {root} holds {folder.name}/, which is no class of "
                    f"--eval_data_path {given}: give the folder that holds the class folders"
                )
        if config.val_fraction and root.samefile(given):
            return root, root
        if config.val_fraction:
            _warn_unused_fraction(config, given)
        return root, given
    if parts and "train" not in parts and "train" in wanted:
        raise UserError(
            f"{root} holds {some(p.name for p in parts.values())} but no train/: move the class "
            "folders for training into train/"
        )
    train = parts.get("train", root)
    held_out = config.val_fraction and "val" not in parts
    val: Path | None = parts.get("val") or (train if held_out else parts.get("test"))
    if val and val == parts.get("test"):
        logger.info("the evaluation images are those of %s", val)
    unused = [path.name for path in folders_in(root) if path not in (train, val)] if parts else []
    if unused:
        logger.warning("%s: beside the parts, %s is not used", root, some(unused))
    if config.val_fraction and not held_out:
        _warn_unused_fraction(config, val)
    if val is None and ("train" in wanted or parts) and "val" in wanted:
        raise UserError(
            f"no evaluation images: {root} does not hold both train/ and val/, so give "
            "--eval_data_path FOLDER, --val_fraction 0.2, or --disable_eval true"
        )
    return train, val or root


def _warn_unused_fraction(config: DataConfig, val: Path | None) -> None:
    logger.warning(
        "--val_fraction %g is not used: %s holds the evaluation images", config.val_fraction, val
    )


def _open_listed(
    config: DataConfig,
    transforms: dict[str, Any],
    context: DistributedContext,
    list_part: Callable[[Path, str], Listing],
    kind: Callable[..., ImageSet],
) -> dict[str, ImageSet]:
    """Open the parts that `list_part` finds in --data_path, as sets of this kind."""
    opened: dict[str, ImageSet] = {}
    for part, transform in transforms.items():
        listing = listed_once(partial(list_part, Path(config.data_path), part), context)
        opened[part] = kind(listing, transform, decoding_of(config))
    return opened


def _list_tars_of(folder: Path, part: str) -> Listing:
    file = folder / f"{part}.tar"
    if part == "val" and not (file.is_file() or file.with_suffix("").is_dir()):
        raise UserError(
            f"no evaluation images: {folder} has no val/ and no val.tar; give --disable_eval true, "
            "or hold some out by tools.pack --val_fraction"
        )
    return list_tars(file if file.is_file() else file.with_suffix(""))


def _open_cifar(config: DataConfig, part: str, transform: Any) -> ImageSet:
    try:
        source = CIFAR100(config.data_path, train=part == "train")
    except RuntimeError as error:
        raise UserError(f"--data_path {config.data_path} has no CIFAR-100: {error}") from None
    return TorchvisionImages(source, transform, source.classes)


def _common_classes(
    config: DataConfig, parts: dict[str, Images], saved: SavedRun | None
) -> list[str]:
    """Return the classes to number the labels by: the checkpoint's, or the first part's own.

    Raises UserError if a part has other classes.
    """
    own = next(iter(parts.values())).classes
    rows = saved.rows if saved else 0  # 0 where the file does not tell it
    has_imagenets_rows = rows == 1000 or not rows and config.data_set in CLASSES
    if not are_names(own, config.data_set) or saved is None:
        classes = own
    elif saved.classes:
        classes = saved.classes
    elif has_imagenets_rows and {*own} <= {*synsets()}:
        classes = synsets()
    else:
        classes = _as_numbers(own, saved)
    for images in parts.values():
        unknown = sorted(set(_used(images)) - set(classes))
        if unknown and saved and classes is saved.classes:
            raise UserError(
                f"checkpoint {saved.source} has {len(classes)} classes ({some(classes)}), the data "
                f"{len(own)} ({some(own)}), of which {some(unknown)} are not in the checkpoint: to "
                "train on, use --finetune with another --output_dir"
            )
        if unknown:
            raise UserError(
                f"{config.data_path}: training and evaluation images have different classes: only "
                f"in training {some(sorted(set(classes) - set(images.classes)))}, only in "
                f"evaluation {some(unknown)}"
            )
    return classes


def _evaluated(
    config: DataConfig, images: Images, classes: list[str], saved: SavedRun | None
) -> list[str]:
    """Return the classes to evaluate over: those of the images, in the order of the model.

    On the data of its own run a checkpoint is evaluated over all classes, as in that run.
    """
    own = set(images.classes)
    some_of_them = [name for name in classes if name in own]
    has_names = config.data_set in ("image_folder", "tar", *CLASSES)
    flags = saved.flags if saved else {}
    is_own = all(flags.get(n) == getattr(config, n) for n in ("data_set", "data_path"))
    if not has_names or is_own or len(some_of_them) == len(classes):
        return classes
    if len(some_of_them) == 1:
        logger.warning("%s has the class %s only: evaluating over all %d classes",
                       config.data_path, some_of_them[0], len(classes))  # fmt: skip
        return classes
    logger.warning("evaluating over the %d of the checkpoint's %d classes that %s has: no other is "
                   "predicted%s", len(some_of_them), len(classes), config.data_path,
                   "" if config.data_set in CLASSES else " (an empty folder adds its class)",
                   )  # fmt: skip
    return some_of_them


def _as_numbers(classes: list[str], saved: SavedRun) -> list[str]:
    """Return the classes for a checkpoint without names: 0 to n - 1 are sorted as numbers."""
    ordered = numbered_as_saved(classes, saved.flags)
    if ordered != classes:
        logger.info("%s does not name its classes: the folders 0 to %d are sorted as numbers",
                    saved.source, len(classes) - 1)  # fmt: skip
    elif all(name.isdigit() for name in classes) and classes != sorted(classes, key=int):
        logger.warning("%s does not name its classes, and the folders are sorted as text: %s",
                       saved.source, some(classes))  # fmt: skip
    return ordered


def _used(images: Images) -> list[str]:
    """Return the classes without those that are empty folders."""
    if not isinstance(images, ListedImages | Part) or images.labels is None:
        return images.classes
    return [images.classes[label] for label in images.labels.unique()]


def _check_classes(config: DataConfig, parts: dict[str, Images], classes: list[str]) -> None:
    """Refuse classes that do not fit --data_set."""
    path = config.data_path
    if "train" in parts and len(classes) < 2:
        raise UserError(f"{path} has a single class, {classes[0]}: give two or more")
    if config.data_set == "digits" and classes != list("0123456789"):
        raise UserError(f"--data_path {path} has other images than digits: give a new folder")
    if config.data_set == "IMNET" and len(classes) != 1000:
        raise UserError(
            f"{path} has {len(classes)} classes, ImageNet-1K has 1000: use --data_set image_folder "
            "for other data"
        )


def _check_counts(path: str, part: str, images: Images) -> None:
    """Refuse class folders without training images, and tell of those without evaluation images."""
    labels = images.all_labels() if isinstance(images, ListedImages | Part) else None
    if labels is None:
        return
    counts = torch.bincount(labels, minlength=len(images.classes)).tolist()
    empty = [name for name, count in zip(images.classes, counts, strict=True) if not count]
    if empty and part == "train":
        raise UserError(
            f"{path} has no training images of class {some(empty)}: add some, or remove the class"
        )
    if empty:
        logger.warning("no evaluation images of %d of the %d classes: %s",
                       len(empty), len(counts), some(empty))  # fmt: skip
