"""Circular convolution by a filter in the frequency domain (HorNet, section 3; GFNet).

Two implementations of y = irfft2(rfft2(x) * K):

- `filter_by_fft`: the definition, by PyTorch's FFTs.
- `filter_by_matmul`: without complex numbers, for export, compilers and hardware without FFTs; each
  one-dimensional transform is a product with a real matrix.

Shapes: x_bchw (batch, C, H, W); weight (C, h, w, 2), real and imaginary part, resized to (C, H, V,
2) with V = W // 2 + 1 frequencies along the width. Both compute in float32 or float64.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATIONS = ("fft", "matmul")


def spectral_filter(
    x_bchw: Tensor, weight: Tensor, impl: str = "fft", resize: bool = True
) -> Tensor:
    """Filter each channel of x_bchw by its own K, in float32 at least; (batch, C, H, W).

    Half-precision FFTs on GPUs need powers of two, and there are none in bfloat16. resize=False for
    a filter of the right size saves a copy, but a traced graph is then valid for this size only.
    """
    x_bchw = x_bchw.to(torch.promote_types(x_bchw.dtype, torch.float32))
    weight = weight.to(x_bchw.dtype)
    if resize:
        weight = resize_filter(weight, x_bchw.shape[2], x_bchw.shape[3] // 2 + 1)
    if impl == "matmul":
        return filter_by_matmul(x_bchw, weight)
    return filter_by_fft(x_bchw, weight)


def resize_filter(weight: Tensor, height: int, width: int) -> Tensor:
    """Resize a filter (C, h, w, 2) to (C, height, width, 2), bilinear with aligned corners."""
    planes = weight.permute(3, 0, 1, 2)
    planes = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=True)
    return planes.permute(1, 2, 3, 0)


def filter_by_fft(x_bchw: Tensor, weight: Tensor) -> Tensor:
    """irfft2(rfft2(x) * K) channel by channel: (batch, C, H, W), K (C, H, V, 2)."""
    height, width = x_bchw.shape[2], x_bchw.shape[3]
    spectrum = torch.fft.rfft2(x_bchw, dim=(2, 3), norm="ortho")
    spectrum = spectrum * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(2, 3), norm="ortho")


def _without_autocast(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Keep autocast from rounding the DFT's operands to bfloat16, an error of 4e-3.

    This does not protect scripted modules: TorchScript compiles the function inside.
    """

    @wraps(function)
    def wrapper(x_bchw: Tensor, weight: Tensor) -> Tensor:
        device = x_bchw.device.type
        if not torch.is_autocast_enabled(device):  # exporters would record the context manager
            return function(x_bchw, weight)
        with torch.autocast(device, enabled=False):
            return function(x_bchw, weight)

    return wrapper


@_without_autocast
def filter_by_matmul(x_bchw: Tensor, weight: Tensor) -> Tensor:
    """The same function as `filter_by_fft`, to 1e-5 in float32, without complex numbers."""
    matrices = dft_matrices(x_bchw.shape[2], x_bchw.shape[3], x_bchw)
    # channels last, so that no product needs a transposed copy
    k_real, k_imag = weight.permute(1, 2, 0, 3).unbind(3)
    return filter_by_matrices(x_bchw, list(k_real.shape), k_real, k_imag, *matrices)


def filter_by_matrices(
    x_bchw: Tensor, sizes: list[int], k_real: Tensor, k_imag: Tensor,
    along_height: Tensor, height_back: Tensor, along_width: Tensor, width_back: Tensor,
) -> Tensor:  # fmt: skip
    """`filter_by_matmul` with its constants: K as (H, V, C), its sizes, and `dft_matrices`."""
    # sizes as numbers, and -1 for the batch: in an exported graph sizes of tensors are operators
    height, frequencies, channels = sizes
    part_rows = (-1, 2 * height, frequencies * channels)  # rows (u, part)
    parts = (-1, height, 2, frequencies, channels)
    z = torch.matmul(along_width, x_bchw.permute(0, 2, 3, 1)).reshape(part_rows)
    real, imag = torch.matmul(along_height, z).reshape(parts).unbind(2)
    z = torch.stack((real * k_real - imag * k_imag, real * k_imag + imag * k_real), 2)
    z = torch.matmul(height_back, z.reshape(part_rows))
    z = z.reshape(-1, height, 2 * frequencies, channels)
    return torch.matmul(width_back, z).permute(0, 3, 1, 2)


def dft_matrices(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the real DFT along the height and its inverse, then along the width and its inverse.

    Shapes: (2 H, 2 H), (2 H, 2 H), (2 V, W), (W, 2 V); dtype and device of `like`.
    """
    along_height = _height_matrix(height, like)
    return along_height, along_height.t(), *_width_matrices(width, like)


def _angles(rows: int, columns: int, period: int, like: Tensor) -> Tensor:
    """Return 2 pi r c / period for r < rows and c < columns.

    r c is reduced modulo the period as an integer, which keeps cos and sin exact.
    """
    r = torch.arange(rows, device=like.device)
    c = torch.arange(columns, device=like.device)
    products = r[:, None] * c[None, :]
    turns = products % torch.full_like(products, period)  # a tensor, for exporters to ONNX
    return turns.to(like.dtype) * (2 * math.pi / period)


def _height_matrix(height: int, like: Tensor) -> Tensor:
    """Return the unitary DFT along the height as a real orthogonal matrix, 2 H x 2 H.

    Rows (u, part), columns (m, part), real part first: (R + i I) exp(-i a) has the real part
    R cos a + I sin a and the imaginary part I cos a - R sin a. The transpose is the inverse.
    """
    angles = _angles(height, height, height, like)
    cos, sin = angles.cos(), angles.sin()
    matrix = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), 1)
    return matrix.reshape(2 * height, 2 * height) * height**-0.5


def _width_matrices(width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real DFT along the width, (2 V, W) with rows (part, v), and its inverse (W, 2 V).

    The frequencies v and W - v of a real signal are conjugates, so the inverse counts each v twice
    except v = 0 and, for even widths, v = W / 2. The sine of these two is 0, so their imaginary
    parts are dropped, as by irfft2.
    """
    frequencies = width // 2 + 1
    angles = _angles(frequencies, width, width, like)
    forward = torch.cat((angles.cos(), -angles.sin()))
    v = torch.arange(frequencies, device=like.device)
    twice = (2 * v % torch.full_like(v, width) != 0).to(like.dtype) + 1
    inverse = (forward * torch.cat((twice, twice))[:, None]).t()
    return forward * width**-0.5, inverse * width**-0.5
