"""Clouds of eight shapes drawn by formula, for the demo and the tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

Rng = np.random.RandomState


def _sphere(r: Rng, n: int) -> np.ndarray:
    p = r.standard_normal((n, 3))
    return p / np.linalg.norm(p, axis=1, keepdims=True)


def _half_sphere(r: Rng, n: int) -> np.ndarray:
    p = _sphere(r, n)
    p[:, 2] = abs(p[:, 2])
    return p


def _cube(r: Rng, n: int) -> np.ndarray:
    p = r.uniform(-1, 1, (n, 3))
    face = r.randint(0, 3, n)
    p[np.arange(n), face] = np.sign(p[np.arange(n), face])
    return p


def _disc(r: Rng, n: int, z: float) -> np.ndarray:
    angle, radius = r.uniform(0, 2 * np.pi, n), np.sqrt(r.uniform(0, 1, n))
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), np.full(n, z)), axis=1)


def _cylinder(r: Rng, n: int) -> np.ndarray:
    angle = r.uniform(0, 2 * np.pi, n // 2)
    side = np.stack((np.cos(angle), np.sin(angle), r.uniform(-1, 1, n // 2)), axis=1)
    quarter = n // 4
    return np.concatenate((side, _disc(r, quarter, 1.0), _disc(r, n - n // 2 - quarter, -1.0)))


def _cone(r: Rng, n: int) -> np.ndarray:
    radius, angle = np.sqrt(r.uniform(0, 1, n // 2)), r.uniform(0, 2 * np.pi, n // 2)
    side = np.stack((radius * np.cos(angle), radius * np.sin(angle), 1 - 2 * radius), axis=1)
    return np.concatenate((side, _disc(r, n - n // 2, -1.0)))


def _pyramid(r: Rng, n: int) -> np.ndarray:
    width, along = np.sqrt(r.uniform(0, 1, n // 2)), r.uniform(-1, 1, n // 2)
    x, y = width, width * along
    for _ in range(3):  # turn the points of one side to a random one
        turn = r.randint(0, 2, n // 2) == 1
        x, y = np.where(turn, -y, x), np.where(turn, x, y)
    base = r.uniform(-1, 1, (n - n // 2, 2))
    bottom = np.concatenate((base, np.full((len(base), 1), -1.0)), axis=1)
    return np.concatenate((np.stack((x, y, 1 - 2 * width), axis=1), bottom))


def _torus(r: Rng, n: int) -> np.ndarray:
    u, w = r.uniform(0, 2 * np.pi, (2, n))
    ring = 1 + 0.4 * np.cos(w)
    return np.stack((ring * np.cos(u), ring * np.sin(u), 0.4 * np.sin(w)), axis=1)


def _helix(r: Rng, n: int) -> np.ndarray:
    t = r.uniform(-1, 1, n)
    angle = 3 * np.pi * t
    return np.stack((np.cos(angle), np.sin(angle), t), axis=1)


SHAPES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "cone": _cone,
    "cube": _cube,
    "cylinder": _cylinder,
    "half sphere": _half_sphere,
    "helix": _helix,
    "pyramid": _pyramid,
    "sphere": _sphere,
    "torus": _torus,
}


def draw_shape(name: str, seed: int, points: int = 512) -> np.ndarray:
    """Draw a shape with z upwards: random proportions of 0.7 to 1.3, and 2 % noise."""
    random = np.random.RandomState(seed)
    cloud = SHAPES[name](random, points) * random.uniform(0.7, 1.3, 3)
    cloud += 0.02 * random.standard_normal(cloud.shape)
    return cloud.astype(np.float32)


def write_shapes(root: Path, train: int, test: int, points: int = 512, seed: int = 0) -> None:
    """Write train/SHAPE/NUMBER.npy and test/SHAPE/NUMBER.npy, unless they are there."""
    for label, name in enumerate(SHAPES):
        for offset, (part, count) in enumerate((("train", train), ("test", test))):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                path = folder / f"{number:04}.npy"
                if not path.exists():
                    own = ((seed * 2 + offset) * len(SHAPES) + label) * 100_000 + number
                    np.save(path, draw_shape(name, own, points))
