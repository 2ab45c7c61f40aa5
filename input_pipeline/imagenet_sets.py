"""The published evaluation sets of ImageNet-1K: their folders, classes and measures."""

import json
import logging
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from torch import Tensor

from input_pipeline.folders import images_by_folder
from input_pipeline.listing import Listing
from runtime.errors import UserError, some

logger = logging.getLogger(__name__)

CLASSES = {
    "imagenet_v2": "imagenet_synsets",
    "imagenet_a": "imagenet_a_synsets",
    "imagenet_r": "imagenet_r_synsets",
    "imagenet_sketch": "imagenet_synsets",
    "imagenet_c": "imagenet_synsets",
}
"""Each set, and timm's list of its classes."""
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
"""The 15 corruptions of the mCE, and AlexNet's mean error: github.com/hendrycks/robustness."""
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = 5
IMAGES = 50_000
"""The validation images of ImageNet-1K, and those of each corruption at each severity."""


@cache
def synsets(name: str = "imagenet_v2") -> list[str]:
    """Return the classes of a set, sorted: by default the 1000 of ImageNet-1K."""
    return _of_timm(f"{CLASSES[name]}.txt").decode().split()


def _of_timm(name: str) -> bytes:
    content = pkgutil.get_data(timm.data.__name__, f"_info/{name}")
    assert content is not None
    return content


def list_set(name: str, root: Path) -> Listing:
    """List the images of a set, at any depth below `root`.

    The folder of an image is its class: a synset, or in imagenet_v2 its number from 0 to 999; in
    imagenet_c these are in CORRUPTION/SEVERITY. Raises UserError for other folders.
    """
    classes = synsets(name)
    numbers = {synset: number for number, synset in enumerate(classes)}
    if name == "imagenet_v2":
        numbers = {str(number): number for number in range(len(classes))}
    found, skipped = images_by_folder(root)
    if found and not found[0][0]:
        raise UserError(f"--data_path {root} has images in no class folder: {found[0][1][0]}")
    unknown = sorted({Path(folder).name for folder, _ in found} - numbers.keys())
    if unknown:
        raise UserError(
            f"--data_path {root} has images in {some(unknown)}, but the {len(classes)} classes of "
            f"{name} are {some(numbers)}"
        )
    folders = [folder for folder, _ in found]
    if name == "imagenet_c":
        _check_corruptions(root, folders)
    depth, ends = 3 if name == "imagenet_c" else 1, defaultdict[tuple[str, ...], list[str]](list)
    for folder in folders:
        ends[Path(folder).parts[-depth:]].append(folder)
    for several in ends.values():
        if len(several) > 1:
            raise UserError(f"--data_path {root} holds several sets: give one of {some(several)}")
    images = [(numbers[Path(folder).name], folder, files) for folder, files in found]
    paths = ((n, f"{folder}/{file}") for n, folder, files in images for file in sorted(files))
    return Listing.of(root, classes, paths, skipped)


def _check_corruptions(root: Path, folders: Sequence[str]) -> None:
    known = {*ALEXNET_ERRORS, *EXTRA_CORRUPTIONS}
    for folder in folders:
        corruption, severity = corruption_of(f"{root}/{folder}/file")
        if corruption not in known or severity not in map(str, range(1, SEVERITIES + 1)):
            raise UserError(f"--data_path {root}: {folder} is not CORRUPTION/SEVERITY/SYNSET")


def corruption_of(file: str) -> tuple[str, str]:
    """Return corruption and severity of an image of ImageNet-C."""
    *_, corruption, severity, _, _ = ("", "", "", *file.split("/"))
    return corruption, severity


def corruption_errors(files: Sequence[str], correct: Tensor) -> dict[str, dict[str, float]]:
    """Return the error of each corruption at each severity, in per cent.

    `correct` (N) says whether the class of each file was predicted.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, file in enumerate(files):
        groups.setdefault(corruption_of(file), []).append(index)
    errors: dict[str, dict[str, float]] = {}
    for corruption, severity in sorted(groups):
        share = correct[groups[corruption, severity]].double().mean().item()
        errors.setdefault(corruption, {})[severity] = 100 * (1 - share)
    return errors


def mean_corruption_error(errors: dict[str, dict[str, float]]) -> float | None:
    """Return the mCE in per cent: the mean of the 15 errors, each relative to AlexNet's.

    None unless all 15 corruptions are there with all severities. Hendrycks and Dietterich, ICLR
    2019, section 3.2.
    """
    if any(len(errors.get(name, {})) < SEVERITIES for name in ALEXNET_ERRORS):
        return None
    means = {name: float(np.mean([*errors[name].values()])) for name in ALEXNET_ERRORS}
    return float(np.mean([means[name] / error for name, error in ALEXNET_ERRORS.items()]))


class RealLabels:
    """The labels of Beyer et al., "Are we done with ImageNet?", 2020: several per image, or none.

    `file` is their real.json, or 'timm' for its copy in timm: a list of labels for each of the
    50,000 images ILSVRC2012_val_XXXXXXXX. Raises UserError if it is something else.
    """

    def __init__(self, file: str) -> None:
        try:
            is_own = file != "timm"
            text = Path(file).read_bytes() if is_own else _of_timm("imagenet_real_labels.json")
            self.labels = json.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(f"--real_labels {file} cannot be read: {error}") from None
        lists: Any = self.labels if isinstance(self.labels, list) else [None]
        if not all(isinstance(item, list) and all(type(n) is int for n in item) for item in lists):
            raise UserError(f"--real_labels {file} is not a list of lists of labels")
        if not all(0 <= label < len(synsets()) for labels in lists for label in labels):
            raise UserError(f"--real_labels {file} has labels outside 0 to {len(synsets()) - 1}")
        if len(self.labels) != IMAGES:
            logger.warning("--real_labels %s is of %d images, not of %d",
                           file, len(self.labels), IMAGES)  # fmt: skip

    def check(self, files: Iterable[str], classes: list[str]) -> None:
        """Raise UserError if the classes, or the names of images, are not those of ImageNet-1K."""
        if {*classes} != {*synsets()}:
            raise UserError("--real_labels needs the 1000 classes of ImageNet, by their synsets")
        for file in files:
            self.of(file)

    def of(self, file: str) -> list[str]:
        """Return the synsets of an image; UserError if its name is none of ImageNet's."""
        found = re.fullmatch(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.\w+", Path(file).name)
        number = int(found[1]) if found else 0
        if not 0 < number <= len(self.labels):
            raise UserError(f"--real_labels: {file} is no validation image of ImageNet-1K")
        return [synsets()[label] for label in self.labels[number - 1]]

    def accuracy(
        self, files: Sequence[str], guesses: Tensor, classes: list[str]
    ) -> tuple[float, float, int]:
        """Return top-1 and top-5 accuracy in per cent, and the number of images with labels.

        `guesses` (N, k) are the classes of highest probability for each file, numbers in `classes`.
        """
        right = [0, 0]
        images = 0
        for file, row in zip(files, guesses.tolist(), strict=True):
            labels = {*self.of(file)}
            images += bool(labels)
            right[0] += classes[row[0]] in labels
            right[1] += any(classes[guess] in labels for guess in row)
        if not images:
            raise UserError("--real_labels: none of the images has a label")
        return 100 * right[0] / images, 100 * right[1] / images, images
