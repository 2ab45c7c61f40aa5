"""Drawn data for detectors and segmentors: discs, squares and triangles on noise."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
OUTLINES = {
    "disc": 0.5 + np.stack((np.cos(_ANGLES), np.sin(_ANGLES)), 1) / 2,
    "square": np.array([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": np.array([(0, 1), (0.5, 0), (1, 1)]),
}
"""Corners (x, y) in the unit square."""
SHAPES = tuple(OUTLINES)
Shape = tuple[int, np.ndarray]
"""Class, and corners (x, y) in pixels."""


def write_coco(
    folder: Path, images: int, seed: int = 0, size: int = 96, classes: Sequence[str] = SHAPES
) -> Path:
    """Draw so many images, and write images/*.jpg and annotations.json in COCO format.

    The first three of `classes`, the categories, are the names of the shapes.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (_, shapes) in enumerate(_write_images(folder, images, seed, size)):
        name = f"{index:04d}.jpg"
        entries.append({"id": index, "file_name": name, "width": size, "height": size})
        for label, corners in shapes:
            x, y = corners.T
            box = [*corners.min(0).tolist(), *np.ptp(corners, 0).tolist()]
            area = float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)
            ids = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1}
            region = {"bbox": box, "area": area, "iscrowd": 0}
            outline = [corners.ravel().round(1).tolist()]
            annotations.append({**ids, **region, "segmentation": outline})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def write_masks(folder: Path, images: int, seed: int = 0, size: int = 96) -> Path:
    """Draw so many images, and write images/*.jpg and masks/*.png: 0 is the ground, then shapes."""
    (folder / "masks").mkdir(parents=True)
    for index, (image, shapes) in enumerate(_write_images(folder, images, seed, size)):
        mask = Image.new("L", image.size)
        for label, corners in shapes:
            ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=label + 1)
        mask.save(folder / "masks" / f"{index:04d}.png")
    return folder


def _write_images(
    folder: Path, images: int, seed: int, size: int
) -> Iterator[tuple[Image.Image, list[Shape]]]:
    """Write images of size x size pixels; yield each with its shapes.

    An image has four fields with at most one shape each, so that shapes don't overlap.
    """
    random = np.random.RandomState(seed)
    field = size // 2
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        image = Image.fromarray(random.randint(0, 60, (size, size, 3)).astype("uint8"))
        shapes = []
        for index in random.permutation(4)[: random.randint(1, 5)]:
            side = random.randint(field // 3, field - 4)
            corner = random.randint(1, field - side - 1, 2) + field * np.array(divmod(index, 2))
            label = random.randint(len(SHAPES))
            corners = corner + side * OUTLINES[SHAPES[label]]
            color = tuple(random.randint(140, 256, 3).tolist())
            ImageDraw.Draw(image).polygon(corners.ravel().tolist(), fill=color)
            shapes.append((label, corners))
        image.save(folder / "images" / f"{number:04d}.jpg", quality=95)
        yield image, shapes
