"""Image files -> images: exactly as Pillow does, or faster and approximately."""

import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from runtime.errors import UserError

with suppress(ImportError):  # HEIC, if its plug-in is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()

MOST_ASPECT = 4000  # longer images would take gigabytes when their short side is enlarged
MOST_PIXELS = 50_000_000  # larger JPEGs are read by Pillow, with its warnings


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the files that Pillow reads here.

    Without those that it only recognises, and without PostScript, which would run Ghostscript.
    """
    Image.preinit()  # the usual formats first: Image.open tries them in this order
    Image.init()
    readers = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if name not in ("MPEG", "EPS")
        and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }
    return frozenset(s for s, name in Image.registered_extensions().items() if name in readers)


def load_image(path: str) -> Image.Image:
    """Read an image file in RGB (the first frame of an animation); UserError if unreadable."""
    with readable(path):
        _check_regular(path)
        return decoded(path)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of Pillow and of files into a UserError about the image `name`."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"image {name} cannot be read: {error}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large: {error}") from None


def decoded(file: Any) -> Image.Image:
    """Like load_image, for a path or an open file, with Pillow's errors."""
    with Image.open(file) as image:
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels")
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            levels = np.asarray(image).astype(np.float32) / 257
            return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _check_regular(path: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")  # opening a pipe would wait forever


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file that isn't decoded yet, which is cheaper once the crop is known."""

    path: str
    data: bytes
    height: int
    width: int

    def decode(self, height: int, width: int) -> np.ndarray:
        """Decode the whole image (H, W, 3), reduced to no less than height x width."""
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(
                self.data, fastdct=True, fastupsample=True, min_height=height, min_width=width
            )
        except ValueError:  # Pillow reads some files that simplejpeg refuses
            with readable(self.path):
                return np.asarray(decoded(self.path))


def load_lazily(path: str) -> Jpeg | Image.Image:
    """Like load_image, but JPEGs of the usual kind are not decoded."""
    import simplejpeg

    with readable(path):
        _check_regular(path)
        data = Path(path).read_bytes()
        with suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            usual = max(height, width) <= MOST_ASPECT * min(height, width)
            if usual and height * width <= MOST_PIXELS and colours in ("YCbCr", "Gray"):
                return Jpeg(path, data, height, width)
        return decoded(path)


_OPENCV_NAMES = dict(nearest="NEAREST", bilinear="LINEAR", bicubic="CUBIC", lanczos="LANCZOS4")


@cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(0)  # each loader process is one thread
    return cv2


def crop_resized(
    image: Jpeg | Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], method: str
) -> Image.Image:
    """Resize the box (top, left, height, width) of an image to `size` (H, W) by OpenCV.

    It is an approximation: JPEGs are decoded no larger than necessary, and there is no antialiasing
    if the box shrinks by less than a third.
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
    how = "AREA" if shrinks else _OPENCV_NAMES.get(method, "AREA")
    interpolation = getattr(cv2, f"INTER_{how}")
    return Image.fromarray(cv2.resize(pixels, size[::-1], interpolation=interpolation))
