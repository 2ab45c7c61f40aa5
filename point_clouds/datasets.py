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
from input_pipeline.image_sets import ImageSet, ListedImages, Part
from input_pipeline.listing import Listing, held_out
from input_pipeline.parts import find_parts
from point_clouds.flags import PointConfig
from point_clouds.readers import MESH_SUFFIXES, SUFFIXES, check_cloud, need, read_arrays, read_cloud
from point_clouds.sampling import EvalPoints, TrainView, to_unit_sphere, upright
from runtime.distributed import SINGLE_PROCESS, DistributedContext, shared_on_machine
from runtime.errors import UserError, some

logger = logging.getLogger(__name__)

Stored = tuple[Listing, Tensor | None]
"""Clouds by name and class, and their points (n, m, 3), float32; None if each has a file."""

SCAN_OBJECT_CLASSES = [
    *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table"),
    *("bed", "pillow", "sink", "sofa", "toilet"),
]


class Clouds(ListedImages):
    """Clouds by index, which `transform` turns into what the network takes.

    One that has no image is unreadable: training replaces it by another of its class, evaluation
    leaves it out.
    """

    def __init__(self, stored: Stored, transform: Any, config: PointConfig) -> None:
        super().__init__(stored[0], transform)
        self.points, self.config = stored[1], config

    def read(self, index: int) -> tuple[np.ndarray, int]:
        name = self.name(index)
        cloud = read_cloud(name) if self.points is None else self.points[index].numpy()
        check_cloud(cloud, name, self.config.local_size)
        if self.config.unit_sphere:
            cloud = to_unit_sphere(cloud)
        if self.config.up_axis == "y":
            cloud = upright(cloud)
        return cloud, self.numbered(int(self.source.labels[index]))

    def blank(self) -> Tensor:
        return torch.zeros(self.config.num_points, 3)


def build_data(
    config: DataConfig,
    _augment: AugmentConfig,
    _input_size: int,
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
    if config.data_set not in READERS:
        raise UserError(f"--data_set {config.data_set}: choose one of {', '.join(READERS)}")
    if not root.is_dir():
        raise UserError(f"--data_path {root} is not a folder")
    open_part = partial(_open, config.data_set, root, context=context)
    parts: dict[str, ImageSet] = {}
    if with_train:
        train = open_part("train")
        fraction = config.val_fraction if with_val else 0.0
        chosen = held_out(train[0], fraction) if fraction else {}
        transforms = {"train": TrainView(points.num_points), "val": EvalPoints(points.num_points)}
        for part in ("train", *(["val"] if with_val else [])):
            if part in chosen:
                whole = Clouds(train, transforms[part], points)
                parts[part] = Part(whole, chosen[part])
            elif part == "train":
                parts[part] = Clouds(train, transforms[part], points)
            else:
                parts[part] = Clouds(open_part("test"), transforms[part], points)
                logger.warning("the best checkpoint is chosen on the test clouds, as in P2P: hold "
                               "out some for that by --val_fraction 0.1")  # fmt: skip
    else:
        parts["val"] = Clouds(open_part("test"), EvalPoints(points.num_points), points)
    return numbered(config, {**parts}, saved)


def _open(data_set: str, root: Path, part: str, context: DistributedContext) -> Stored:
    """Open a part, 'train' or 'test', by one process per machine."""

    def make() -> dict[str, Any]:
        listing, points = stored_part(data_set, root, part)
        return {"listing": listing.__getstate__(), "points": points}

    shared = shared_on_machine(make, context)
    listing = Listing(**shared["listing"])
    if any(listing.path(i).lower().endswith(_MESHES) for i in range(len(listing))):
        need("trimesh")
    return listing, shared["points"]


_MESHES = tuple(suffix.encode() for suffix in MESH_SUFFIXES)


def stored_part(data_set: str, root: Path, part: str) -> Stored:
    """Read or list a part of a data set, in the first format that is there."""
    for reader in READERS[data_set]:
        found = reader(root, part)
        if found is not None:
            return found
    raise UserError(
        f"--data_path {root} holds no {part} clouds in a known format of --data_set {data_set}: "
        "see docs/point-clouds.md"
    )


def _prepared(root: Path, part: str) -> Stored | None:
    path = root / f"{part}.npz"
    if not path.is_file():
        return None
    clouds, labels = read_arrays(path)
    with np.load(path, allow_pickle=False) as arrays:
        classes, names = arrays["classes"].tolist(), arrays["names"].tolist()
    return _stored(path, classes, names, clouds, labels)


def _p2p_pickle(root: Path, part: str) -> Stored | None:
    """modelnet40_train_8192pts_fps.dat, modelnet40_shape_names.txt and modelnet40_train.txt."""
    found = sorted(root.glob(f"modelnet40_{part}_*pts_fps.dat"))
    if not found:
        return None
    clouds, labels = read_arrays(found[0])
    names = _lines(root / f"modelnet40_{part}.txt", needed=False)
    return _stored(found[0], _lines(root / "modelnet40_shape_names.txt"), names, clouds, labels)


def _ply_hdf5(root: Path, part: str) -> Stored | None:
    """ply_data_train0.h5, ..., and shape_names.txt, of modelnet40_ply_hdf5_2048."""
    files = sorted(root.glob(f"ply_data_{part}*.h5"))
    if not files:
        return None
    read = [read_arrays(path) for path in files]
    names = [f"{f.stem}/{i}" for f, (c, _) in zip(files, read, strict=True) for i in range(len(c))]
    clouds, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    return _stored(root, _lines(root / "shape_names.txt"), names, clouds, labels)


def _resampled(root: Path, part: str) -> Stored | None:
    """modelnet40_train.txt names the files CLASS/CLASS_0001.txt of modelnet40_normal_resampled."""
    if not (root / f"modelnet40_{part}.txt").is_file():
        return None
    classes = _lines(root / "modelnet40_shape_names.txt")
    numbers = {name: number for number, name in enumerate(classes)}
    files = []
    for name in _lines(root / f"modelnet40_{part}.txt"):
        folder = name.rpartition("_")[0]
        if folder not in numbers:
            raise UserError(f"{root}/modelnet40_{part}.txt: {name} is of no class in shape_names")
        files.append((numbers[folder], f"{folder}/{name}.txt"))
    return Listing.of(root, classes, files, {}), None


def _princeton(root: Path, part: str) -> Stored | None:
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


def _scan_object(root: Path, part: str) -> Stored | None:
    """The hardest variant, PB_T50_RS, in main_split/ or here."""
    name = f"{'training' if part == 'train' else part}_objectdataset_augmentedrot_scale75.h5"
    for path in (root / name, root / "main_split" / name):
        if path.is_file():
            clouds, labels = read_arrays(path)
            return _stored(path, SCAN_OBJECT_CLASSES, [], clouds, labels)
    return None


def _folders(root: Path, part: str) -> Stored | None:
    """train/CLASS/FILE and test/CLASS/FILE; val/ takes the place of test/ if there is none."""
    parts = find_parts(root)
    folder = parts.get(part) or (parts.get("val") if part == "test" else None)
    if folder is None:
        return None
    listing = list_classes(folder, None, SUFFIXES)
    if listing.skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(listing.skipped.items()))
        logger.info("%s: skipped %s", folder, kinds)
    return listing, None


READERS: dict[str, tuple[Callable[[Path, str], Stored | None], ...]] = {
    "ModelNet40": (_prepared, _p2p_pickle, _ply_hdf5, _resampled, _princeton),
    "ScanObjectNN": (_prepared, _scan_object),
    "clouds": (_prepared, _folders),
}
"""--data_set -> its formats."""


def _stored(
    path: Path, classes: list[str], names: list[str], clouds: np.ndarray, labels: np.ndarray
) -> Stored:
    """Return clouds of a file; UserError if labels or names do not fit."""
    if not len(clouds):
        raise UserError(f"{path} holds no clouds")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{path} has labels from {labels.min()} to {labels.max()}, but {len(classes)} classes "
            f"({some(classes)})"
        )
    if names and len(names) != len(clouds):
        raise UserError(f"{path} holds {len(clouds)} clouds, but {len(names)} names are listed")
    names = names or [f"{path.stem}/{number}" for number in range(len(clouds))]
    pairs = zip(labels.tolist(), names, strict=True)
    return Listing.of(path.parent, classes, pairs, {}), torch.from_numpy(clouds)


def _lines(path: Path, needed: bool = True) -> list[str]:
    if not needed and not path.is_file():
        return []
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return [re.sub(r"\.txt$", "", line) for line in lines if line]
