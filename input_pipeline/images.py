"""Image files -> images: exactly as Pillow does, or faster and approximately."""

import io
import math
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from input_pipeline.arrays import check_pixels, is_tiff, read_plain, read_tiff, scaled, turned
from runtime.errors import UserError, reason_of

with suppress(ImportError):  # HEIC, if its plug-in is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()

# a single text or profile in a PNG may be as large as all of them together, 64 MB
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

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


@dataclass(frozen=True)
class Decoding:
    """How a file becomes an image as people see it; the release does nothing of this."""

    exif_orientation: bool = True
    """Turn the image as its EXIF metadata say."""
    background: str | None = "white"
    """Colour, as Pillow names it, under transparent pixels; None drops the transparency."""
    channels: int = 3
    value_range: tuple[float, float] | None = None
    """Pixel values that become 0 and 1; None: those of 8 or 16 bits."""

    def __post_init__(self) -> None:
        low, high = self.value_range or (0, 1)
        if type(self.channels) is not int or self.channels < 1 or not low < high:
            raise ValueError(f"{self.channels} channels with values from {low} to {high}")

    @property
    def as_array(self) -> bool:
        """Whether images are tensors, float32 (channels, H, W) from 0 to 1, not 8-bit RGB."""
        return self.channels != 3 or self.value_range is not None


AS_RELEASED = Decoding(exif_orientation=False, background=None)
_TURNS = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str, decoding: Decoding = Decoding()) -> Any:  # noqa: B008 - frozen
    """Read an image file (the first frame of an animation); UserError if unreadable.

    It is an image of Pillow in RGB, or a tensor if decoding.as_array.
    """
    with readable(path):
        _check_regular(path)
        return decoded(path, decoding)


def readable_files(files: list[Path], decoding: Decoding) -> list[Path]:
    """Return the images that can be read, and tell of the others; UserError if none can."""
    found, problems = [], []
    for file in files:
        try:
            load_image(str(file), decoding)
            found.append(file)
        except UserError as error:
            problems.append(error)
    if problems and not found:
        raise problems[0]
    sys.stderr.writelines(f"skipped: {problem}\n" for problem in problems)
    return found


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of Pillow and of files into a UserError about the image `name`."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large: {error}") from None
    except UnidentifiedImageError:  # whose message names an object in memory
        raise UserError(f"image {name} cannot be read: no format that Pillow knows") from None
    except Exception as error:  # Pillow's plug-ins raise many types for damaged files
        raise UserError(f"image {name} cannot be read: {reason_of(error)}") from None


def decoded(file: Any, decoding: Decoding) -> Any:
    """Like load_image, for a path or an open file, with Pillow's errors."""
    if decoding.as_array:
        return _decoded_as_array(file, decoding)
    with _opened(file) as image:
        _check_aspect(*image.size)
        image.load()  # Pillow turns TIFFs itself, and removes their orientation
        found = _in_rgb(image, decoding.background)
        turn = _TURNS.get(orientation_of(image)) if decoding.exif_orientation else None
        return found if turn is None else found.transpose(turn)


@contextmanager
def _opened(file: Any) -> Iterator[Image.Image]:
    # Pillow maps a path of an uncompressed image into memory, and garbles TIFFs that it turns there
    with (
        open(file, "rb") if isinstance(file, str) else nullcontext(file) as opened,
        _identified(opened) as image,
    ):
        yield image


def _identified(file: Any) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        if is_tiff(file):
            raise ValueError(
                "Pillow does not know such a TIFF: give --in_chans or --value_range LOW HIGH"
            ) from None
        raise


def _decoded_as_array(file: Any, decoding: Decoding) -> Tensor:
    channels, converts = decoding.channels, decoding.channels in (1, 3)
    if is_tiff(file):
        pixels, orientation, has_colours = read_tiff(file)
        if converts and has_colours and pixels.dtype == np.uint8 and pixels.shape[2] in (3, 4):
            pixels = _converted(Image.fromarray(pixels), decoding)
    else:
        with _opened(file) as image:
            check_pixels(image, decoding.value_range)
            orientation = orientation_of(image)
            is_grey = image.mode in ("L", "F") or image.mode.startswith("I")
            # as people see it; other numbers of channels are the file's own
            takes_own = is_grey or not converts
            pixels = read_plain(image) if takes_own else _converted(image, decoding)
    _check_aspect(pixels.shape[1], pixels.shape[0])
    if decoding.exif_orientation:
        pixels = turned(pixels, orientation)
    return scaled(pixels, channels, decoding.value_range)


def _converted(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """Return colours of 8 bits as RGB or grey, (H, W, C)."""
    colours = _in_rgb(image, decoding.background)
    return read_plain(colours.convert("L") if decoding.channels == 1 else colours)


def _check_aspect(width: int, height: int) -> None:
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise ValueError(
            f"one side of {width} x {height} pixels is more than {MOST_ASPECT} times the other"
        )


def _in_rgb(image: Image.Image, background: str | None) -> Image.Image:
    # Pillow would clip values above 255
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit numbers of an unknown range: convert it to 8 or 16 bits"
        )
    if background is None or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    under = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(under, image.convert("RGBA")).convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """Return the orientation in EXIF metadata: 1 is upright, 5 to 8 swap height and width."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata of a sound image
        return 1


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
    decoding: Decoding

    def decode(self, height: int, width: int) -> np.ndarray:
        """Decode the whole image (H, W, 3), reduced to no less than height x width."""
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(
                self.data, fastdct=True, fastupsample=True, min_height=height, min_width=width
            )
        except ValueError:  # Pillow reads some files that simplejpeg refuses
            with readable(self.path):
                return np.asarray(decoded(self.path, self.decoding))


def load_lazily(path: str, decoding: Decoding = AS_RELEASED) -> Jpeg | Image.Image:
    """Like load_image, but upright JPEGs of the usual kind are not decoded."""
    import simplejpeg

    with readable(path):
        _check_regular(path)
        data = Path(path).read_bytes()
        with suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            usual = max(height, width) <= MOST_ASPECT * min(height, width)
            usual &= height * width <= MOST_PIXELS and colours in ("YCbCr", "Gray")
            if usual and (not decoding.exif_orientation or _is_upright(data)):
                return Jpeg(path, data, height, width, decoding)
        return decoded(path, decoding)


def _is_upright(data: bytes) -> bool:
    if b"Exif\0" not in data and b"tiff:Orientation" not in data:  # the latter in XMP
        return True
    with Image.open(io.BytesIO(data)) as image:  # reads the metadata only
        return orientation_of(image) == 1


_OPENCV_NAMES = dict(nearest="NEAREST", bilinear="LINEAR", bicubic="CUBIC", lanczos="LANCZOS4")


@cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(0)  # each loader process is one thread
    return cv2


class OpenCVImage:
    """An image with Pillow's affine transformations, done faster by OpenCV.

    The pixels differ by interpolation: by another cubic, and by blending with the fill colour at
    the border.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, image.size

    def transform(
        self,
        size: tuple[int, int],
        _: Image.Transform,
        matrix: Sequence[float],
        resample: Image.Resampling,
        fillcolor: tuple[int, ...],
    ) -> Image.Image:
        cv2 = _opencv()
        a, b, c, d, e, f = matrix
        # Pillow counts from the corner of a pixel, OpenCV from its centre
        centred = (a, b, c + (a + b - 1) / 2), (d, e, f + (d + e - 1) / 2)
        flags = getattr(cv2, f"INTER_{_OPENCV_NAMES[resample.name.lower()]}") | cv2.WARP_INVERSE_MAP
        pixels, fill = np.asarray(self.image), tuple(map(float, fillcolor))
        return Image.fromarray(
            cv2.warpAffine(pixels, np.array(centred), size, flags=flags, borderValue=fill)
        )

    def rotate(self, angle: float, **options: Any) -> Image.Image:
        """Turn it counter-clockwise around its centre, by degrees."""
        x, y = self.size[0] / 2, self.size[1] / 2
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        matrix = c, -s, x - c * x + s * y, s, c, y - s * x - c * y
        return self.transform(self.size, Image.Transform.AFFINE, matrix, **options)


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
        wanted = (
            math.ceil(image.height * size[0] / height),
            math.ceil(image.width * size[1] / width),
        )
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
