"""From files to clouds: arrays (n, 3), float32.

Nothing that a file holds is run: pickles may only contain arrays.
"""

import importlib
import io
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import MissingPackageError, UserError, reason_of

logger = logging.getLogger(__name__)

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
    return np.ascontiguousarray(array[:, :3], dtype=np.float32)


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


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read many clouds of equal size, (n, m, 3) float32, and their labels (n), int64.

    Formats: HDF5 with `data` and `label`; .npz with `points` and `labels`, as
    `python -m point_clouds.prepare` writes it; the pickles of P2P and Point-BERT (.dat).
    """
    with _naming(path):
        if path.suffix == ".dat":
            clouds, labels = _read_pickle(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                clouds, labels = arrays["points"], arrays["labels"]
        else:
            with need("h5py").File(path, "r") as file:
                clouds, labels = file["data"][...], file["label"][...]
        clouds, labels = np.asarray(clouds), np.asarray(labels).reshape(-1)
        if clouds.ndim != 3 or clouds.shape[2] < 3 or clouds.dtype.kind != "f":
            raise ValueError(f"it holds {clouds.shape} {clouds.dtype}, not clouds (n, m, 3)")
        if len(labels) != len(clouds) or labels.dtype.kind not in "iu":
            raise ValueError(f"it holds {len(clouds)} clouds, but {len(labels)} labels")
        clouds = np.ascontiguousarray(clouds[..., :3], dtype=np.float32)
        return clouds, labels.astype(np.int64)


def _read_text(path: Path) -> np.ndarray:
    text = path.read_text()
    lines = [line for line in text.replace(",", " ").splitlines() if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    if path.suffix.lower() == ".pts" and len(lines[0].split()) == 1:  # the number of points
        lines = lines[1:]
    return np.loadtxt(io.StringIO("\n".join(lines)), dtype=np.float32, ndmin=2)


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
    return points, np.array([int(np.asarray(label).item()) for label in labels])


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
