"""Images as tensors, for other pixels than 8-bit RGB: any channels, 16 bits, floats."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.errors import MissingPackageError

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF files begin."""
RANGES = {"uint8": (0, 255), "uint16": (0, 65535)}
"""Values of black and white by the type of the pixels; others need --value_range."""


def is_tiff(file: Any) -> bool:
    """Return whether a path, or an open file at its start, is a TIFF."""
    with open(file, "rb") if isinstance(file, str) else nullcontext(file) as opened:
        start = opened.read(4)
        opened.seek(0)
    return start in TIFF


def read_tiff(file: Any) -> tuple[np.ndarray, int, bool]:
    """Return the first image of a TIFF: pixels (H, W, C), EXIF orientation, whether it has colours.

    Channels may be beside each other, in planes, or in pages of their own. Raises ValueError for
    images with more axes, and for colours other than RGB and those of a palette.
    """
    try:
        import tifffile
    except ImportError:
        raise MissingPackageError(
            "TIFF files need tifffile for --in_chans and --value_range: pip install '.[tiff]'"
        ) from None
    with tifffile.TiffFile(file) as tiff:
        series, first = tiff.series[0], tiff.pages.first
        if np.prod(series.shape) > 2 * (Image.MAX_IMAGE_PIXELS or 2**62):
            raise ValueError(f"its shape {series.shape} is too large")
        # without axes of one element
        kept = [i for i, axis in enumerate(series.axes) if axis in "YX" or series.shape[i] > 1]
        pixels = series.asarray().reshape([series.shape[i] for i in kept])
        tag, bits = first.tags.get("Orientation"), first.bitspersample
        kind = getattr(first.photometric, "name", str(first.photometric))
        palette = first.colormap
    axes = "".join(series.axes[i] for i in kept)
    others = axes.replace("Y", "").replace("X", "")
    if len(others) > 1 or len(axes) != 2 + len(others):
        raise ValueError(f"its axes are {series.axes}, {series.shape}: more than one of channels")
    pixels = pixels.transpose([axes.index(axis) for axis in "YX" + others])
    pixels = pixels if others else pixels[..., None]
    if pixels.dtype == bool:
        pixels, bits = pixels.astype(np.uint8) * 255, 8
    if kind == "PALETTE" and palette is not None and not others:
        pixels, bits = (palette[:, pixels[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0), 8
    elif kind == "MINISWHITE" and pixels.dtype.kind == "u":
        pixels = pixels.dtype.type(2**bits - 1) - pixels
    elif kind not in ("MINISBLACK", "RGB"):
        raise ValueError(f"its pixels are {kind}: save it as RGB or as MINISBLACK")
    if bits < 8 * pixels.dtype.itemsize:  # the range of their type is not theirs
        pixels = pixels.astype(np.int32)
    return pixels, int(tag.value) if tag else 1, kind in ("PALETTE", "RGB")


EIGHT_BITS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Formats of which Pillow gives the pixels themselves; of PNG except colours of 16 bits."""


def check_pixels(image: Image.Image, value_range: tuple[float, float] | None) -> None:
    """ValueError for an image, not loaded yet, of which Pillow may give other values or fewer bits.

    It reads 8 of 16 bits of colours, and stretches PGM files to 16 bits.
    """
    tiles: Any = getattr(image, "tile", None)
    if tiles and ";16" in str(tiles[0][3]) and image.mode in ("RGB", "RGBA", "LA"):
        raise ValueError("its colours have 16 bits, of which only 8 would be read: save it as TIFF")
    if value_range and image.format not in EIGHT_BITS:
        raise ValueError(f"{image.format} files do not keep their values: save it as TIFF or PNG")


def read_plain(image: Image.Image) -> np.ndarray:
    """Return the pixels (H, W, C) of an image of Pillow, in its own channels."""
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    pixels = np.asarray(image)
    pixels = pixels.astype(np.uint16) if is_16_bit else pixels
    return pixels if pixels.ndim == 3 else pixels[..., None]


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H, W, C) as an EXIF orientation says."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {
        2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1),
    }.get(orientation, (1, 1))  # fmt: skip
    return pixels[::rows, ::columns]


def scaled(pixels: np.ndarray, channels: int, value_range: tuple[float, float] | None) -> Tensor:
    """Return pixels (H, W, C) as float32 (channels, H, W) from 0 to 1.

    Values outside the range are clipped. Raises ValueError if the range is needed but not known,
    the number of channels is another one, or a value is not finite.
    """
    if channels == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if pixels.shape[2] != channels:
        raise ValueError(f"it has {pixels.shape[2]} channels, --in_chans is {channels}")
    bounds = value_range or RANGES.get(str(pixels.dtype))
    if bounds is None:
        raise ValueError(
            f"its pixels are {pixels.dtype} of an unknown range: give --value_range LOW HIGH"
        )
    low, high = bounds
    values = (pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are not finite")
    return torch.from_numpy(np.ascontiguousarray(values.clip(0, 1).transpose(2, 0, 1)))


def as_picture(image: Any) -> Image.Image:
    """Return an image as people can see it: a tensor (C, H, W) by its first channels."""
    if isinstance(image, Image.Image):
        return image
    levels = (255 * rgb_of(image)).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def rgb_of(images: Tensor) -> Tensor:
    """Return three channels (..., 3, H, W) of images (..., C, H, W): the first ones, or a grey."""
    channels = images.shape[-3]
    return images[..., :3, :, :] if channels >= 3 else images[..., [0] * 3, :, :]
