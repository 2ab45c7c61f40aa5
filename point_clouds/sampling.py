"""From a cloud (n, 3), as it was read, to what the network takes."""

import math

import numpy as np
import torch
from torch import Tensor

from point_clouds.projection import rotate, view_matrices
from runtime.errors import UserError

ASPECT, SHIFT = (2 / 3, 3 / 2), (-0.2, 0.2)
THETA, PHI = (0.04, 1.94), (-0.4, -0.2)
"""Ranges of training views, over pi."""
NEAR_ORIGIN = 1e-3
"""Points of at most this squared norm are not sampled, as by pointnet2_ops."""


def to_unit_sphere(cloud: np.ndarray) -> np.ndarray:
    """Move the mean to the origin and scale the largest norm to 1."""
    centred = cloud - cloud.mean(axis=0)
    return centred / np.sqrt((centred**2).sum(axis=1)).max()


def check_away_from_origin(cloud: np.ndarray, name: str) -> None:
    """Raise UserError if most points are so near to the origin that they are never sampled."""
    if ((cloud**2).sum(axis=1) <= NEAR_ORIGIN).mean() > 0.5:
        raise UserError(
            f"{name}: most points lie within 0.03 of the origin, where none are sampled: scale the "
            "clouds, or give --unit_sphere true"
        )


def upright(cloud: np.ndarray) -> np.ndarray:
    """Turn a cloud whose y axis points upwards so that z does: (x, y, z) -> (-z, -x, y)."""
    return np.stack((-cloud[:, 2], -cloud[:, 0], cloud[:, 1]), axis=1)


def farthest_points(cloud: np.ndarray, count: int) -> np.ndarray:
    """Return the indices (count) of farthest point sampling, which starts at point 0.

    The rules are those of pointnet2_ops in float32, which P2P used: points near the origin are not
    chosen; of equally far ones the smallest index modulo the threads of its kernel comes first;
    when no other point is left, index 0 repeats.
    """
    threads = 2 ** int(math.log2(min(512, len(cloud))))
    order = np.lexsort((np.arange(len(cloud)), np.arange(len(cloud)) % threads))
    axes = np.ascontiguousarray(cloud[order].T, dtype=np.float32)
    first = int(np.flatnonzero(order == 0)[0])
    is_candidate = (axes**2).sum(axis=0) > NEAR_ORIGIN
    distance = np.where(is_candidate, np.float32(1e10), np.float32(-1))
    chosen = np.full(count, first)
    squared = np.empty_like(distance)
    for number in range(1, count):
        last = axes[:, chosen[number - 1]]
        squared.fill(0)
        for axis, coordinate in zip(axes, last, strict=True):
            difference = axis - coordinate
            difference *= difference
            squared += difference
        np.minimum(distance, squared, out=distance)
        farthest = int(distance.argmax())
        if distance[farthest] > -1:
            chosen[number] = farthest
    return order[chosen]


def stretch(cloud: Tensor) -> Tensor:
    """Scale each axis by 2/3 to 3/2 and shift it by up to 0.2, by NumPy's global generator.

    Of this, only the ratio of the first two axes changes the image of a view.
    """
    scale, shift = np.random.uniform(*ASPECT, 3), np.random.uniform(*SHIFT, 3)
    return cloud * torch.from_numpy(scale).float() + torch.from_numpy(shift).float()


class TrainView:
    """A random choice of points, a random view and stretch: (n, 3) -> (2, num_points, 3).

    The first is the cloud, which decides the colours, the second its view.
    """

    def __init__(self, num_points: int) -> None:
        self.num_points = num_points

    def __call__(self, cloud: np.ndarray) -> Tensor:
        cloud = cloud[torch.randperm(len(cloud)).numpy()]  # it starts at a random point
        pool = 75 * self.num_points // 64  # 1200 of 1024, 2400 of 2048, 4800 of 4096
        cloud = repeated(cloud[farthest_points(cloud, min(pool, len(cloud)))], self.num_points)
        points = torch.from_numpy(cloud[torch.randperm(len(cloud))[: self.num_points].numpy()])
        theta, phi = (math.pi * torch.empty(()).uniform_(*bounds) for bounds in (THETA, PHI))
        rotated = stretch(rotate(points, view_matrices(theta, phi)))
        return torch.stack((points, rotated))


class EvalPoints:
    """The farthest points of a cloud, without randomness: (n, 3) -> (num_points, 3)."""

    def __init__(self, num_points: int) -> None:
        self.num_points = num_points

    def __call__(self, cloud: np.ndarray) -> Tensor:
        chosen = farthest_points(cloud, min(self.num_points, len(cloud)))
        return torch.from_numpy(repeated(cloud[chosen], self.num_points))


def repeated(cloud: np.ndarray, count: int) -> np.ndarray:
    """Return at least `count` points: a smaller cloud is repeated."""
    return cloud if len(cloud) >= count else cloud[np.arange(count) % len(cloud)]
