"""Drawn data for detectors and segmentors: discs, squares and triangles on a noisy ground."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle")
Shape = tuple[int, list[tuple[float, float]]]


def draw(random: np.random.RandomState, size: int) -> tuple[Image.Image, list[Shape]]:
    """An RGB image of (size, size) pixels, and of each shape its class and its corners (x, y).

    The image has four fields with at most one shape each, so that none covers another.
    """
    image = Image.fromarray(random.randint(0, 60, (size, size, 3)).astype("uint8"))
    field = size // 2
    shapes = []
    for index in random.permutation(4)[: random.randint(1, 5)]:
        side = random.randint(field // 3, field - 4)
        left, top = random.randint(1, field - side - 1, 2) + field * np.array(divmod(index, 2))
        label = random.randint(len(SHAPES))
        corners = [(left + side * x, top + side * y) for x, y in _outline(label)]
        ImageDraw.Draw(image).polygon(corners, fill=tuple(random.randint(140, 256, 3).tolist()))
        shapes.append((label, corners))
    return image, shapes


def _outline(label: int) -> list[tuple[float, float]]:
    """The corners of a shape in the unit square."""
    if label == 0:
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        return [(0.5 + np.cos(a) / 2, 0.5 + np.sin(a) / 2) for a in angles]
    if label == 1:
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    return [(0, 1), (0.5, 0), (1, 1)]


def write_coco(
    folder: Path, images: int, seed: int = 0, size: int = 96, classes: Sequence[str] = SHAPES
) -> Path:
    """folder/annotations.json in COCO's format, and its images folder/images/*.jpg.

    Args:
        folder: Made anew.
        images: How many.
        seed: Of the drawing.
        size: Pixels of a side.
        classes: Names of the categories; the first three are drawn.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (_, shapes) in enumerate(_write_images(folder, images, seed, size)):
        name = f"{index:04d}.jpg"
        entries.append({"id": index, "file_name": name, "width": size, "height": size})
        for label, corners in shapes:
            x, y = np.array(corners).T
            width, height = x.max() - x.min(), y.max() - y.min()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [float(x.min()), float(y.min()), float(width), float(height)],
                    "area": float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2),
                    "iscrowd": 0,
                    "segmentation": [np.array(corners).ravel().round(1).tolist()],
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def write_masks(folder: Path, images: int, seed: int = 0, size: int = 96) -> Path:
    """folder/images/*.jpg and folder/masks/*.png, whose values are 0 (ground) and class + 1.

    Args: as write_coco.
    """
    (folder / "masks").mkdir(parents=True)
    for index, (image, shapes) in enumerate(_write_images(folder, images, seed, size)):
        mask = Image.new("L", image.size)
        for label, corners in shapes:
            ImageDraw.Draw(mask).polygon(corners, fill=label + 1)
        mask.save(folder / "masks" / f"{index:04d}.png")
    return folder


def _write_images(
    folder: Path, images: int, seed: int, size: int
) -> Iterator[tuple[Image.Image, list[Shape]]]:
    random = np.random.RandomState(seed)
    (folder / "images").mkdir(parents=True)
    for index in range(images):
        image, shapes = draw(random, size)
        image.save(folder / "images" / f"{index:04d}.jpg", quality=95)
        yield image, shapes
