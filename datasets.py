"""Data sets: class folders, CIFAR-100, the digits, and what timm reads."""

import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.readers import reader_wds
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import CIFAR100, ImageFolder

from checkpoints.fitting import numbered_classes
from config import AugmentConfig, DataConfig
from images import decoded, is_image, load_image, load_lazily, readable
from runtime.errors import UserError, reason_of
from transforms import crops_fast, eval_transform, mean_std, train_transform

logger = logging.getLogger(__name__)

FOLDERS = ("IMNET", "image_folder", "digits")
TIMM_PREFIXES = ("wds", "hfds", "hfids", "tfds", "torch")

_warn_of_sample = reader_wds.log_and_continue


@dataclass(frozen=True)
class Data:
    """The data sets of a run, and the names of its classes in the order of the labels."""

    train: Dataset | None
    val: Dataset | None
    classes: list[str]


def build_data(
    config: DataConfig,
    augment: AugmentConfig,
    input_size: int,
    with_train: bool = True,
    with_val: bool = True,
) -> Data:
    """Opens the data sets that a run needs; raises UserError for one that is missing or empty."""
    prefix = config.data_set.partition("/")[0]
    if prefix not in (*FOLDERS, "CIFAR", "tar", *TIMM_PREFIXES):
        raise UserError(
            f"--data_set {config.data_set}: choose one of {', '.join(FOLDERS)}, CIFAR, tar, or one "
            f"of timm's: {', '.join(name + '/' for name in TIMM_PREFIXES)}"
        )
    if not Path(config.data_path).is_dir() and (config.has_path or prefix not in ("hfds", "hfids")):
        raise UserError(f"--data_path {config.data_path} is not a folder")
    normalisation = mean_std(config)
    views = {}
    if with_train:
        views["train"] = train_transform(augment, input_size, *normalisation)
    if with_val:
        crop_pct = augment.crop_pct
        views["val"] = eval_transform(input_size, *normalisation, crop_pct=crop_pct)
    if prefix in FOLDERS:
        parts = _folders(config, views)
    elif prefix == "CIFAR":
        parts = {part: _cifar(config, part, views[part]) for part in views}
    else:
        parts = {part: _from_timm(config, part, views[part]) for part in views}

    known = {part: _class_names(dataset, config) for part, dataset in parts.items()}
    if len(known) == 2 and known["train"] != known["val"]:
        train, val = set(known["train"]), set(known["val"])
        raise UserError(
            f"{config.data_path}: images to train on and to evaluate on have different classes: "
            f"only the first {_some(train - val)}, only the second {_some(val - train)}"
        )
    classes = next(iter(known.values()))
    _check_classes(config, classes, with_train)
    chosen = {part: _limited(dataset, config.max_images) for part, dataset in parts.items()}
    return Data(chosen.get("train"), chosen.get("val"), classes)


def fetch_data(config: DataConfig) -> None:
    """Puts the data sets that bring their images along where data_path says, once."""
    name, path = config.data_set, config.data_path
    if name not in ("digits", "CIFAR") and not name.startswith("torch/"):
        return
    if not config.has_path:
        raise UserError(f"--data_set {name} needs a place: give --data_path FOLDER")
    try:
        if name == "digits":
            write_digits(Path(path))
        elif name == "CIFAR":
            CIFAR100(path, download=True)
        else:
            for split in (config.train_split, config.val_split):
                create_dataset(name, root=path, split=split, download=True)
    except (OSError, RuntimeError, AssertionError) as error:
        by_hand = f"; {CIFAR100.url} can be put there by hand" if name == "CIFAR" else ""
        raise UserError(
            f"--data_set {name} cannot be put into --data_path {path}: {error}{by_hand}"
        ) from None


def _class_names(dataset: Dataset, config: DataConfig) -> list[str]:
    dataset = _whole(dataset)
    source = getattr(dataset, "reader", dataset)
    # tar files have it under another name
    index = getattr(source, "class_to_idx", getattr(source, "class_name_to_idx", None))
    names = {label: str(name) for name, label in reversed((index or {}).items())}
    if not names:
        return numbered_classes(config.nb_classes)
    return [names[label] for label in sorted(names)]  # the first of several names of a class


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "none"


def _check_classes(config: DataConfig, classes: list[str], with_train: bool) -> None:
    path = config.data_path
    if with_train and len(classes) < 2:
        raise UserError(f"{path} holds one class only, {classes[0]}: give two or more")
    if config.data_set == "digits" and classes != list("0123456789"):
        raise UserError(f"--data_path {path} holds other images than digits: give a new folder")
    if config.data_set == "IMNET" and len(classes) != 1000:
        raise UserError(
            f"{path} holds {len(classes)} classes, ImageNet-1K has 1000: "
            "use --data_set image_folder for other data"
        )


def _limited(dataset: Dataset, most: int | None) -> Dataset:
    if most is None or isinstance(dataset, IterableDataset) or most >= image_count(dataset):
        return dataset  # a stream was opened with its number of images
    length = image_count(dataset)
    return Subset(dataset, [i * length // most for i in range(most)])


def image_count(dataset: Dataset) -> int:
    """Images of a data set, for all processes together."""
    if isinstance(dataset, IterableDataset):
        return int(dataset.reader.num_samples)  # type: ignore[attr-defined]
    return len(dataset)  # type: ignore[arg-type]


def file_name(dataset: Dataset, index: int) -> str:
    """The file of an image, or its number where it has none."""
    if isinstance(dataset, Subset):
        return file_name(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ImageFolder):
        return dataset.samples[index][0]
    if isinstance(dataset, ImageDataset):
        return str(dataset.filename(index) or index)
    return str(index)


def _folders(config: DataConfig, views: dict[str, Any]) -> dict[str, Dataset]:
    """The parts of a data set of class folders."""
    root = Path(config.data_path)
    if config.data_set != "image_folder":
        return {part: _image_folder(root / part, view) for part, view in views.items()}
    if config.eval_data_path:
        folders = {"train": root, "val": Path(config.eval_data_path)}
        return {part: _image_folder(folders[part], view) for part, view in views.items()}
    train = root / "train" if (root / "train").is_dir() else root
    val = root / "val" if (root / "val").is_dir() else root
    if config.val_fraction and val == root:
        opened = {part: _image_folder(train, view) for part, view in views.items()}
        return _held_out(opened, config.val_fraction)
    if len(views) == 2 and root in (train, val):
        raise UserError(
            f"no evaluation images: {root} does not hold both train/ and val/, so give "
            "--eval_data_path FOLDER, --val_fraction 0.2, or --disable_eval true"
        )
    return {part: _image_folder({"train": train, "val": val}[part], views[part]) for part in views}


def _held_out(opened: dict[str, ImageFolder], share: float) -> dict[str, Dataset]:
    """Parts `opened` in the same folder -> each its own images, drawn with a fixed seed."""
    some = next(iter(opened.values()))
    targets = np.array(some.targets)
    chosen: dict[str, list[int]] = {"train": [], "val": []}
    for label, name in enumerate(some.classes):
        indices = np.random.RandomState(0).permutation(np.flatnonzero(targets == label))
        held_out = max(1, round(share * len(indices)))
        if held_out == len(indices):
            raise UserError(
                f"{some.root}/{name} holds {len(indices)} image(s): --val_fraction {share} leaves "
                "none to train on"
            )
        chosen["val"] += indices[:held_out].tolist()
        chosen["train"] += indices[held_out:].tolist()
    logger.info("%d of the %d images of %s are held out for evaluation",
                len(chosen["val"]), len(targets), some.root)  # fmt: skip
    return {part: Subset(dataset, sorted(chosen[part])) for part, dataset in opened.items()}


def loader_for(transform: Any) -> Callable[[str], Any]:
    """What opens an image file for that transform."""
    return load_lazily if crops_fast(transform) else load_image


def _image_folder(folder: Path, transform: Any) -> ImageFolder:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    loader = loader_for(transform)
    try:
        return ImageFolder(str(folder), transform, loader=loader, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has to hold one folder of images a class: {str(error).splitlines()[0]}"
        ) from None


def _cifar(config: DataConfig, part: str, transform: Any) -> CIFAR100:
    try:
        return CIFAR100(config.data_path, train=part == "train", transform=transform)
    except RuntimeError as error:
        raise UserError(f"--data_path {config.data_path} holds no CIFAR-100: {error}") from None


def _from_timm(config: DataConfig, part: str, transform: Any) -> Dataset:
    """A data set of timm's: tar files, or what its factory reads by a prefix."""
    split = config.train_split if part == "train" else config.val_split
    prefix = config.data_set.partition("/")[0]
    root = config.data_path if config.has_path else None
    try:
        if prefix == "tar":
            return ReaderImages("", _tar_reader(Path(config.data_path), part), transform=transform)
        if prefix in ("hfds", "hfids"):
            _import_hugging_face_datasets()
        dataset = create_dataset(
            config.data_set,
            root=root,
            split=split,
            is_training=part == "train",
            batch_size=config.batch_size,
            num_samples=config.max_images,
        )
    except ImportError as error:
        raise UserError(f"--data_set {config.data_set} needs a package: {error}") from None
    except Exception as error:  # each reader has its own types for what is missing
        reason = reason_of(error)
        if prefix == "wds":
            reason += f"; shards are named as in --{part}_split '{part}-{{000..099}}.tar|50000'"
        raise UserError(f"--data_set {config.data_set}, split {split}: {reason}") from None
    if isinstance(dataset, ImageDataset):  # which shows the next image instead of a damaged one
        return ReaderImages("", dataset.reader, transform=transform)
    dataset.transform = transform
    if isinstance(dataset, ImageFolder):
        dataset.loader = loader_for(transform)
    if isinstance(dataset, IterableImageDataset):
        dataset.target_transform = _KnownLabel(len(_class_names(dataset, config)))
    return dataset


@dataclass(frozen=True)
class _KnownLabel:
    """Passes labels on; shards do not say beforehand which ones they hold."""

    num_classes: int

    def __call__(self, label: int) -> int:
        if not 0 <= label < self.num_classes:
            raise UserError(f"the label {label} is beyond --nb_classes {self.num_classes}")
        return label


def _tar_reader(root: Path, part: str) -> ReaderImageInTar:
    file = root / f"{part}.tar"
    return ReaderImageInTar(str(file if file.is_file() else root / part))


def _import_hugging_face_datasets() -> None:
    """Makes `import datasets` mean Hugging Face's package, which this file shadows, from here on.

    What was imported from this file before stays as it is; the package's parts import each other
    under that name for as long as they live.
    """
    own, path = sys.modules[__name__], sys.path[:]
    here = Path(__file__).parent
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != here]
    if hasattr(own, "FOLDERS"):
        del sys.modules[__name__]
    try:
        importlib.import_module(__name__)
    except ImportError:
        sys.modules[__name__] = own
        raise
    finally:
        sys.path[:] = path


class ReaderImages(ImageDataset):
    """Images of one of timm's readers; raises UserError for one that cannot be read."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with readable(self.filename(index)):
            file, label = self.reader[index]
            image = decoded(file)
        return self.transform(image), label


class BadImages:
    """The list of images that cannot be read, in a file that all processes share.

    Args:
        path: The file, bad_images.txt of a run: a line an image, with the reason.
        most: How many there may be.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most

    def add(self, name: str, reason: str) -> None:
        """Notes an image, once; raises UserError with the list where there are too many."""
        try:
            text = ""
            if self.path.exists():
                text = self.path.read_text(errors="surrogateescape")  # any name of a file
            known = text.splitlines()
            if name not in {line.split("\t")[0] for line in known}:
                known.append(f"{name}\t{' '.join(reason.split())}")
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # a short line is written whole
                with self.path.open("a", errors="surrogateescape") as file:
                    file.write(known[-1] + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None
        # several processes may have noted the same image
        names = list(dict.fromkeys(line.split("\t")[0] for line in known))
        if len(names) > self.most:
            raise UserError(
                f"{len(names)} images cannot be read, more than --max_bad_images {self.most}: "
                f"{', '.join(names[-3:])}, and all others in {self.path}"
            )


def note_damaged_shards(bad_images: BadImages) -> None:
    """Lists what timm's reader of WebDataset cannot read, which it leaves out with a warning."""

    def note(error: Exception) -> bool:
        _warn_of_sample(error)  # raises what only a wrong flag explains
        *_, name = error.args or ("",)
        is_shard = isinstance(name, str) and name.endswith(".tar")
        # images have no names there, and would count anew each epoch by their addresses
        reason = re.sub(" at 0x[0-9a-f]+", "", repr(error))
        bad_images.add(name if is_shard else "an image of a shard", reason)
        return True

    reader_wds.log_and_continue = note


def labels_of(dataset: Dataset) -> list[int] | None:
    """The label of each image, where they are known without reading the images."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return labels and [labels[index] for index in dataset.indices]
    source = dataset.reader if isinstance(dataset, ReaderImages) else dataset
    labels = getattr(source, "targets", None)
    return None if labels is None else [int(label) for label in labels]


def transform_of(dataset: Dataset) -> Any:
    """The transform of a data set, or of the one that it is a part of."""
    return _whole(dataset).transform  # type: ignore[attr-defined]


def _whole(dataset: Dataset) -> Dataset:
    """The data set itself, or the one that it is a part of."""
    return _whole(dataset.dataset) if isinstance(dataset, Subset) else dataset


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
