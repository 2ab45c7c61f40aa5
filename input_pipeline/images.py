"""Reading image files: exactly as Pillow does, or faster with other pixels."""

import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from runtime.errors import UserError

MOST_ASPECT = 4000
"""Longer images would take gigabytes once their short side is enlarged."""
MOST_PIXELS = 50_000_000
"""Larger JPEGs are left to Pillow and its warnings."""


def is_image(path: str) -> bool:
    """Whether a file's name is one of an image."""
    return path.lower().endswith((*IMG_EXTENSIONS, ".gif"))


def find_images(arguments: list[str]) -> list[Path]:
    """Image files in the order of the arguments; of folders all within, sorted.

    Raises UserError for a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and is_image(p.name))
            if not inside:
                raise UserError(f"folder {path} holds no images")
            files += inside
        else:
            files.append(path)
    return files


def load_image(path: str) -> Image.Image:
    """An image file in RGB, of an animation the first frame; raises UserError for one that cannot
    be decoded."""
    with readable(path):
        _check_regular(path)
        return decoded(path)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns what goes wrong with the image of that name into UserError."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"image {name} cannot be read: {error}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large: {error}") from None


def decoded(file: Any) -> Image.Image:
    """As load_image, of a path or an open file; with the errors of Pillow."""
    with Image.open(file) as image:
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels")
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            levels = np.asarray(image).astype(np.float32) / 257
            return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _check_regular(path: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no regular file")  # to open a pipe would wait for ever


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file that is not decoded yet: to know the crop first makes it cheaper."""

    path: str
    data: bytes
    height: int
    width: int

    def decode(self, height: int, width: int) -> np.ndarray:
        """The whole image (H, W, 3), reduced while it stays at least that large.

        Raises:
            UserError: the file is damaged.
        """
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(
                self.data, fastdct=True, fastupsample=True, min_height=height, min_width=width
            )
        except ValueError:  # Pillow takes some files that are refused here
            with readable(self.path):
                return np.asarray(decoded(self.path))


def load_lazily(path: str) -> Jpeg | Image.Image:
    """A JPEG of the usual kind, not decoded; any other image as load_image."""
    import simplejpeg

    with readable(path):
        _check_regular(path)
        data = Path(path).read_bytes()
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return decoded(path)
        usual = max(height, width) <= MOST_ASPECT * min(height, width)
        if usual and height * width <= MOST_PIXELS and colours in ("YCbCr", "Gray"):
            return Jpeg(path, data, height, width)
        return decoded(path)


_OPENCV_NAMES = {
    "nearest": "INTER_NEAREST",
    "bilinear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "lanczos": "INTER_LANCZOS4",
}


@cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(0)  # each loader process is one thread
    return cv2


def crop_resized(
    image: Jpeg | Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], method: str
) -> Image.Image:
    """The box (top, left, height, width) of an image, resized by OpenCV to `size` (H, W).

    Approximately: a JPEG is decoded no larger than the result needs, and what shrinks by less than
    a half is not smoothed first.
    """
    cv2 = _opencv()
    top, left, height, width = box
    if isinstance(image, Jpeg):
        wanted = ceil(image.height * size[0] / height), ceil(image.width * size[1] / width)
        pixels = image.decode(*wanted)
        y, x = pixels.shape[0] / image.height, pixels.shape[1] / image.width
        top, left = round(top * y), round(left * x)
        height, width = max(1, round(height * y)), max(1, round(width * x))
    else:
        pixels = np.asarray(image)
    pixels = pixels[top : top + height, left : left + width]
    shrinks = height > 1.5 * size[0] or width > 1.5 * size[1]
    how = cv2.INTER_AREA
    if not shrinks and method in _OPENCV_NAMES:
        how = getattr(cv2, _OPENCV_NAMES[method])
    return Image.fromarray(cv2.resize(pixels, size[::-1], interpolation=how))
