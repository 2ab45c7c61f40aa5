"""The geometry of P2P: views of a cloud, the pixels of its points, and the sum over each pixel.

Source: P2P (Wang et al., NeurIPS 2022, arXiv 2208.02812), geometry-preserved projection. Points are
(x, y, z) with z upwards. A view turns them and drops the depth, z: x becomes the row of the image,
y the column.
"""

import math

import torch
from torch import Tensor


def view_matrices(theta: Tensor, phi: Tensor) -> Tensor:
    """Return rotations Ry(phi) Rz(-theta) (..., 3, 3) by angles in radians (...).

    theta turns about the upward axis, phi tilts: 0 looks from above, -pi / 2 from the side.
    """
    (cos_t, sin_t), (cos_p, sin_p) = ((a.cos(), a.sin()) for a in (theta, phi))
    zero = torch.zeros_like(theta)
    rows = (
        (cos_p * cos_t, cos_p * sin_t, sin_p),
        (-sin_t, cos_t, zero),
        (-sin_p * cos_t, -sin_p * sin_t, cos_p),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def views_of(thetas: Tensor, phis: Tensor) -> Tensor:
    """Return the views (V, 3, 3), float32, of all pairs of angles over pi, theta fastest."""
    phi, theta = torch.meshgrid(math.pi * phis, math.pi * thetas, indexing="ij")
    return view_matrices(theta.flatten(), phi.flatten()).float()


def validation_views() -> Tensor:
    """Return the 8 views of the evaluation after each epoch: (8, 3, 3)."""
    thetas = torch.linspace(0.1, 2, 9, dtype=torch.float64)[:8]
    return views_of(thetas, torch.tensor([-0.35], dtype=torch.float64))


def test_views() -> Tensor:
    """Return the 40 views of the test: (40, 3, 3)."""
    phis = torch.tensor([-0.4, -1 / 3, -4 / 15, -0.2], dtype=torch.float64)
    return views_of(0.2 * torch.arange(10, dtype=torch.float64), phis)


def rotate(cloud: Tensor, matrices: Tensor) -> Tensor:
    """Return R p for the points (..., N, 3) and rotations (..., 3, 3)."""
    # no matrix product: on GPUs it may be less exact than float32, and pixels would change
    return (matrices[..., None, :, :] * cloud[..., None, :]).sum(-1)


def centre_pixels(rotated: Tensor, size: int) -> Tensor:
    """Return the pixel (row, column) of each point: (B, N, 3) -> (B, N, 2), int64.

    The wider side of a cloud takes size - 2 pixels, and its middle is that of the image. All 3 x 3
    pixels around these are inside. A cloud without extent falls on one pixel.
    """
    xy = rotated[..., :2]
    low, high = xy.amin(dim=1, keepdim=True), xy.amax(dim=1, keepdim=True)
    extent = (high - low).amax(dim=2, keepdim=True)
    # Two divisions in float32, or the outermost points of other clouds fall one pixel short.
    # Dividing by a number would multiply by its reciprocal on GPUs.
    cell = extent / torch.full_like(extent, size - 3)
    pixels = ((xy - low) / cell.where(cell > 0, 1)).floor().long()
    middle = (pixels.amax(dim=1, keepdim=True) + 2) // 2
    return pixels + size // 2 - middle


def splat(features: Tensor, centres: Tensor, size: int) -> Tensor:
    """Add the features of each point to the 3 x 3 pixels around its centre.

    Args:
        features: (B, N, C).
        centres: Rows and columns from 1 to size - 2, int64 (B, N, 2).

    Returns (B, C, size, size). The nine sums are made in place, one after the other, without nine
    copies of the features. On a CPU that takes half the time in evaluation, and less than one sum
    per point with a sum over windows of the whole map.
    """
    batch, _, channels = features.shape
    rows, columns = centres.unbind(-1)
    image = torch.arange(batch, device=features.device)[:, None]
    index = ((image * size + rows) * size + columns).flatten()
    flat, points = features.new_zeros(batch * size * size, channels), features.flatten(0, 1)
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            flat.index_add_(0, index + row * size + column, points)
    maps = flat.view(batch, size, size, channels).permute(0, 3, 1, 2)
    # not in the channels-last layout, in which batch norm of large maps is less exact on CPUs
    return maps.contiguous()
