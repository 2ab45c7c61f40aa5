"""The clouds of a run: files of ModelNet40 and ScanObjectNN, and one's own folders.

A part of a data set is a listing, and the points themselves if a file holds many clouds.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.sources import SavedRun
from config.flags import AugmentConfig, DataConfig
from datasets import Data, numbered
from input_pipeline.folders import list_classes
from input_pipeline.image_sets import Images, ListedImages
from input_pipeline.image_sets import Part as Subset
from input_pipeline.listing import Listing, compared, held_out
from input_pipeline.parts import find_parts
from point_clouds.flags import PointConfig
from point_clouds.readers import (
    MESH_SUFFIXES,
    SUFFIXES,
    Stored,
    check_cloud,
    need,
    read_cloud,
    read_lines,
    read_stored,
)
from point_clouds.sampling import (
    EvalPoints,
    TrainView,
    check_away_from_origin,
    to_unit_sphere,
    upright,
)
from runtime.distributed import SINGLE_PROCESS, DistributedContext, shared_on_machine
from runtime.errors import UserError, some
from runtime.sizes import Size

logger = logging.getLogger(__name__)

Part = tuple[Listing, Stored | None]
"""Clouds by name and class, and the clouds themselves; None if each has a file."""

SCAN_OBJECT_CLASSES = [
    *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table"),
    *("bed", "pillow", "sink", "sofa", "toilet"),
]


class MissingPartError(UserError):
    """There are no training or no test clouds in a known format."""


class Clouds(ListedImages):
    """Clouds by index, which `transform` turns into what the network takes.

    One that has no image is unreadable: training replaces it by another of its class, evaluation
    leaves it out.
    """

    def __init__(self, part: Part, transform: Any, config: PointConfig) -> None:
        super().__init__(part[0], transform)
        self.stored, self.config = part[1], config

    def read(self, index: int) -> tuple[np.ndarray, int]:
        name = self.name(index)
        cloud = read_cloud(name) if self.stored is None else self.stored[index]
        check_cloud(cloud, name, self.config.local_size)
        if self.config.unit_sphere:
            cloud = to_unit_sphere(cloud)
        check_away_from_origin(cloud, name)
        if self.config.up_axis == "y":
            cloud = upright(cloud)
        return cloud.astype(np.float32), self.numbered(int(self.source.labels[index]))

    def blank(self) -> Tensor:
        return torch.zeros(self.config.num_points, 3)


def check_data(config: DataConfig, **_: bool) -> None:
    """Raise UserError if --data_set has no such value, or --data_path is not a folder."""
    if config.data_set not in READERS:
        raise UserError(f"--data_set {config.data_set}: choose one of {', '.join(READERS)}")
    if not Path(config.data_path).is_dir():
        raise UserError(f"--data_path {config.data_path} is not a folder")


def build_data(
    config: DataConfig,
    _augment: AugmentConfig,
    _input_size: Size,
    with_train: bool = True,
    with_val: bool = True,
    saved: SavedRun | None = None,
    context: DistributedContext = SINGLE_PROCESS,
    *,
    points: PointConfig,
) -> Data:
    """Open the clouds that a run needs, like `datasets.build_data`.

    To train, --val_fraction of the training clouds are held out for evaluation; 0 evaluates the
    test clouds. To test, these are evaluated.
    """
    root = Path(config.data_path)
    check_data(config)
    if saved:
        _warn_of_changes(points, saved)
    train_view, eval_points = TrainView(points.num_points), EvalPoints(points.num_points)
    open_part = partial(_open, config.data_set, root, points=points, context=context)
    if not with_train:
        test = Clouds(open_part("test"), eval_points, points)
        return numbered(config, {"val": test}, saved)
    train, test_part = open_part("train"), _open_test(open_part)
    clouds = Clouds(train, train_view, points)
    parts: dict[str, Images] = {"train": clouds}
    _check_test(clouds.classes, test_part)
    if with_val and _has_val(config):
        parts["val"] = Clouds(open_part("val"), eval_points, points)
    elif with_val and config.val_fraction:
        chosen = held_out(train[0], config.val_fraction)
        parts["train"] = Subset(clouds, chosen["train"])
        parts["val"] = Subset(Clouds(train, eval_points, points), chosen["val"])
    elif with_val:
        parts["val"] = Clouds(test_part or open_part("test"), eval_points, points)
        logger.warning("the best checkpoint is chosen on the test clouds, as in P2P: hold some out "
                       "for that by --val_fraction 0.1")  # fmt: skip
    return numbered(config, parts, saved)


def _has_val(config: DataConfig) -> bool:
    """Return whether one's own folders have val/ to choose the epoch by, beside test/."""
    is_own = config.data_set == "clouds"
    return is_own and {"val", "test"} <= find_parts(Path(config.data_path)).keys()


def _open_test(open_part: Callable[[str], Part]) -> Part | None:
    """Open the test clouds, of the vote after the training; None, with a warning, without any."""
    try:
        return open_part("test")
    except MissingPartError:
        logger.warning("there are no test clouds, so there will be no vote")
        return None


def _check_test(classes: list[str], test: Part | None) -> None:
    """Raise UserError before the training if the clouds of its vote do not fit."""
    if test:
        unknown = {test[0].classes[label] for label in test[0].labels.unique()} - {*classes}
        if unknown:
            raise UserError(f"test clouds have classes without training clouds: {some(unknown)}")


def _warn_of_changes(points: PointConfig, saved: SavedRun) -> None:
    """Warn of flags that the weights do not show, if the checkpoint's run had others."""
    for name, value in vars(points).items():
        if name in saved.flags and saved.flags[name] != value:
            logger.warning(
                "--%s is %s, %s was trained with %s", name, value, saved.source, saved.flags[name]
            )


def _open(
    data_set: str, root: Path, part: str, points: PointConfig, context: DistributedContext
) -> Part:
    """Open a part, 'train' or 'test', by one process per machine."""

    def make() -> dict[str, Any]:
        listing, stored = stored_part(data_set, root, part)
        arrays = {"points": stored.points, "ends": stored.ends} if stored else {}
        return {"listing": listing.__getstate__(), **arrays}

    shared = shared_on_machine(make, context)
    listing = compared(Listing(**shared["listing"]), context)
    if "points" not in shared:
        if any(listing.path(i).lower().endswith(_MESHES) for i in range(len(listing))):
            need("trimesh")
        return listing, None
    stored = Stored(shared["points"], shared["ends"])
    smallest = int(stored.ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).min())
    if smallest < points.num_points:
        logger.warning("%s: %s clouds of %d points are repeated to --num_points %d",
                       root, part, smallest, points.num_points)  # fmt: skip
    return listing, stored


_MESHES = tuple(suffix.encode() for suffix in MESH_SUFFIXES)


def stored_part(data_set: str, root: Path, part: str) -> Part:
    """Read or list a part of a data set, in the first format that is there."""
    for reader in READERS[data_set]:
        found = reader(root, part)
        if found is not None:
            return found
    raise MissingPartError(
        f"--data_path {root} holds no {part} clouds in a known format of --data_set {data_set}: "
        "see docs/point-clouds.md"
    )


def _prepared(root: Path, part: str) -> Part | None:
    path = root / f"{part}.npz"
    return _listed(path, [path]) if path.is_file() else None


def _p2p_pickle(root: Path, part: str) -> Part | None:
    """modelnet40_train_8192pts_fps.dat, modelnet40_shape_names.txt and modelnet40_train.txt."""
    found = list(root.glob(f"modelnet40_{part}_*pts_fps.dat"))
    if not found:
        return None
    largest = max(found, key=lambda path: int(re.sub(r"\D", "", path.name.split("_")[2]) or 0))
    names = root / f"modelnet40_{part}.txt"
    return _listed(
        largest,
        [largest],
        read_lines(root / "modelnet40_shape_names.txt"),
        read_lines(names) if names.is_file() else [],
    )


def _ply_hdf5(root: Path, part: str) -> Part | None:
    """ply_data_train0.h5, ..., and shape_names.txt, of modelnet40_ply_hdf5_2048."""
    files = sorted(root.glob(f"ply_data_{part}*.h5"))
    return _listed(root, files, read_lines(root / "shape_names.txt")) if files else None


def _resampled(root: Path, part: str) -> Part | None:
    """modelnet40_train.txt names the files CLASS/CLASS_0001.txt of modelnet40_normal_resampled."""
    if not (root / f"modelnet40_{part}.txt").is_file():
        return None
    classes = read_lines(root / "modelnet40_shape_names.txt")
    numbers = {name: number for number, name in enumerate(classes)}
    files = []
    for name in read_lines(root / f"modelnet40_{part}.txt"):
        folder = name.rpartition("_")[0]
        if folder not in numbers:
            raise UserError(f"{root}/modelnet40_{part}.txt: {name} is of no class in shape_names")
        files.append((numbers[folder], f"{folder}/{name}.txt"))
    return Listing.of(root, classes, files, {}), None


def _princeton(root: Path, part: str) -> Part | None:
    """CLASS/train/*.off, as in ModelNet40.zip."""
    inner = root / "ModelNet40" if (root / "ModelNet40").is_dir() else root
    classes = sorted(p.parent.name for p in inner.glob(f"*/{part}") if p.is_dir())
    files = [
        (number, f"{name}/{part}/{path.name}")
        for number, name in enumerate(classes)
        for path in sorted((inner / name / part).glob("*.off"))
        if not path.name.startswith(".")
    ]
    return (Listing.of(inner, classes, files, {}), None) if files else None


def _scan_object(root: Path, part: str) -> Part | None:
    """The hardest variant, PB_T50_RS, in main_split/ or here."""
    name = f"{'training' if part == 'train' else part}_objectdataset_augmentedrot_scale75.h5"
    for path in (root / name, root / "main_split" / name):
        if path.is_file():
            return _listed(path, [path], SCAN_OBJECT_CLASSES)
    return None


def _folders(root: Path, part: str) -> Part | None:
    """train/CLASS/FILE and test/CLASS/FILE; val/ takes the place of test/ if there is none."""
    parts = find_parts(root)
    folder = parts.get(part) or (parts.get("val") if part == "test" else None)
    if folder is None:
        return None
    return list_classes(folder, None, SUFFIXES), None


READERS: dict[str, tuple[Callable[[Path, str], Part | None], ...]] = {
    "ModelNet40": (_prepared, _p2p_pickle, _ply_hdf5, _resampled, _princeton),
    "ScanObjectNN": (_prepared, _scan_object),
    "clouds": (_prepared, _folders),
}
"""--data_set -> its formats."""


def _listed(
    path: Path, files: list[Path], classes: list[str] | None = None, names: list[str] | None = None
) -> Part:
    """Read files of many clouds; UserError if labels or names do not fit."""
    logger.info("reading %s", ", ".join(file.name for file in files))
    read = [read_stored(file) for file in files]
    labels = np.concatenate([one.labels for one in read])
    classes = classes or read[0].classes
    if len(set(classes)) < len(classes):
        raise UserError(f"{path}: a class is listed twice: {some(classes, len(classes))}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{path} has labels from {labels.min()} to {labels.max()}, but {len(classes)} classes "
            f"({some(classes)})"
        )
    names = names or read[0].names
    if names and len(names) != len(labels):
        raise UserError(f"{path} holds {len(labels)} clouds, but {len(names)} names are listed")
    if not names:
        pairs = zip(files, read, strict=True)
        names = [f"{file.stem}/{i}" for file, one in pairs for i in range(len(one.labels))]
    root = path if path.is_dir() else path.parent
    listing = Listing.of(root, classes, zip(labels.tolist(), names, strict=True), {})
    return listing, Stored.joined([one.clouds for one in read])
