"""From files to clouds: arrays (n, 3), as exact as the files have them.

Nothing that a file holds is run: pickles may only contain arrays.
"""

import importlib
import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import MissingPackageError, UserError, reason_of

MESH_SUFFIXES = frozenset({".off", ".ply", ".obj", ".stl"})
SUFFIXES = MESH_SUFFIXES | {".npy", ".npz", ".txt", ".xyz", ".pts", ".csv"}
"""Files of one cloud each."""
SURFACE_POINTS = 10_000
"""Points drawn on a mesh, as many as modelnet40_normal_resampled has."""


def read_cloud(path: str | Path) -> np.ndarray:
    """Read one cloud; columns after x, y, z (normals, colours) are left out.

    Points are drawn on the surface of meshes, by area, the same ones each time. Raises UserError if
    the file cannot be read.
    """
    path = Path(path)
    with _naming(path):
        if path.suffix.lower() in MESH_SUFFIXES:
            cloud = _read_mesh(path)
        elif path.suffix.lower() == ".npy":
            cloud = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                cloud = _only_array(arrays)
        else:
            cloud = _read_text(path)
        return as_points(cloud)


def as_points(array: Any) -> np.ndarray:
    """Return the first three columns; ValueError for another shape or no numbers."""
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        shape = " x ".join(map(str, array.shape))
        raise ValueError(f"it holds {shape or 'one'} {array.dtype}, not numbers of n x 3 or more")
    kept = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
    return np.ascontiguousarray(array[:, :3], dtype=kept)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list of names, without '.txt' at their ends; UserError without it."""
    with _naming(path):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.removesuffix(".txt") for line in lines if line]


def check_cloud(cloud: np.ndarray, name: str, least: int) -> None:
    """Raise UserError for a cloud that has no image: too few points, all of them equal, NaN."""
    if len(cloud) < max(2, least):
        raise UserError(
            f"{name} has {len(cloud)} points, fewer than the {max(2, least)} of a neighbourhood"
        )
    if not np.isfinite(cloud).all():
        raise UserError(f"{name} has coordinates that are not finite")
    if (cloud == cloud[0]).all():
        raise UserError(f"{name} has {len(cloud)} equal points")


@dataclass(frozen=True)
class Stored:
    """Many clouds, one after another."""

    points: Tensor
    """(total, 3), as exact as in the file."""
    ends: Tensor
    """The end of each cloud, int64 (n)."""

    @classmethod
    def joined(cls, many: list["Stored"]) -> "Stored":
        if len(many) == 1:  # without a copy
            return many[0]
        starts = np.cumsum([0, *(len(one.points) for one in many)]).tolist()
        ends = [one.ends + start for one, start in zip(many, starts, strict=False)]
        return cls(torch.cat([one.points for one in many]), torch.cat(ends))

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a cloud (m, 3)."""
        start = int(self.ends[index - 1]) if index else 0
        return self.points[start : int(self.ends[index])].numpy()


@dataclass(frozen=True)
class StoredFile:
    """What a file of many clouds holds."""

    clouds: Stored
    labels: np.ndarray
    """int64 (n)."""
    classes: list[str]
    """Empty if the file does not name them."""
    names: list[str]
    """Of the clouds; empty if they have none."""


def read_stored(path: Path) -> StoredFile:
    """Read a file of many clouds; UserError if it cannot be read.

    Formats: HDF5 with `data` (n, m, 3 or more) and `label`; the .npz that
    `python -m point_clouds.prepare` writes; the pickles of P2P and Point-BERT (.dat).
    """
    classes, names, ends = [], [], None
    with _naming(path):
        if path.suffix == ".dat":
            clouds, labels = _read_pickle(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                clouds, labels, ends = (arrays[name] for name in ("points", "labels", "ends"))
                classes, names = arrays["classes"].tolist(), arrays["names"].tolist()
        else:
            with need("h5py").File(path, "r") as file:
                clouds, labels = file["data"][...], file["label"][...]
        labels = np.asarray(labels).reshape(-1)
        if ends is None:
            if clouds.ndim != 3 or clouds.shape[2] < 3 or clouds.dtype.kind != "f":
                raise ValueError(f"it holds {clouds.shape} {clouds.dtype}, not clouds (n, m, 3)")
            ends = clouds.shape[1] * np.arange(1, len(clouds) + 1)
            clouds = clouds.reshape(-1, clouds.shape[2])
        if len(labels) != len(ends) or labels.dtype.kind not in "iu":
            what = f"{len(labels)} {labels.dtype} labels"
            raise ValueError(f"it holds {len(ends)} clouds, but {what}")
        if not len(ends) or ends[-1] != len(clouds) or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError("it holds no clouds, or their ends are damaged")
        points = torch.from_numpy(as_points(clouds))
        ends = torch.from_numpy(ends.astype(np.int64))
        return StoredFile(Stored(points, ends), labels.astype(np.int64), classes, names)


def _read_text(path: Path) -> np.ndarray:
    """Read columns between blanks, commas or semicolons, below a header or a count, if any."""
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if lines and re.match(r"\s*(//|#|\"?[A-Za-z_])", lines[0]):
        del lines[0]
    if lines and len(lines[0].split()) == 1 and lines[0].strip().isdigit():
        del lines[0]
    if not lines:
        raise ValueError("it is empty")
    if re.match(r"\s*-?\d+,\d+[\s;]+-?\d+,\d", lines[0]):
        raise ValueError("it has decimal commas: write points")
    table = "\n".join(lines).replace(",", " ").replace(";", " ")
    return np.loadtxt(io.StringIO(table), ndmin=2)


def _read_mesh(path: Path) -> np.ndarray:
    import trimesh

    mesh: Any = trimesh.load(path, process=False, force=None)
    if isinstance(mesh, trimesh.Scene):
        mesh = mesh.to_mesh()
    if not len(getattr(mesh, "faces", ())):
        return np.asarray(mesh.vertices)
    if not mesh.area > 0:
        raise ValueError("its faces have no area")
    points, _ = trimesh.sample.sample_surface(mesh, SURFACE_POINTS, seed=0)
    return np.asarray(points)


def _only_array(arrays: Any) -> np.ndarray:
    names = [name for name in ("points", "xyz", "data") if name in arrays.files]
    names = names or arrays.files
    if len(names) != 1:
        raise ValueError(f"it holds {', '.join(names) or 'nothing'}: call its points 'points'")
    return arrays[names[0]]


class _ArraysOnly(pickle.Unpickler):
    """Reads lists, numbers, text and NumPy's arrays, and nothing that could run code."""

    ALLOWED = frozenset(
        {(f"numpy.{core}.multiarray", name) for core in ("core", "_core")
         for name in ("_reconstruct", "scalar")}
        | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"it holds {module}.{name}, which could run code")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        clouds, labels = _ArraysOnly(file, encoding="latin1").load()
    # normals are left out cloud by cloud: all of them would take as much memory again
    points = np.stack([as_points(cloud) for cloud in clouds])
    return points, np.array([np.asarray(label).item() for label in labels])


def need(package: str) -> Any:
    """Import a package of the extra 'points'; MissingPackageError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackageError(
            f"these files need the package {package}: pip install '.[points]'"
        ) from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or reason_of(error)}") from None
    except Exception as error:  # the libraries raise many types for damaged files
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
