"""Drawn data for detectors and segmentors: filled circles and squares, 96 pixels wide."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square")


def draw(random: np.random.RandomState, size: int = 96):
    """An image, its mask (0 ground, 1 circle, 2 square), and per shape its class and box."""
    image = Image.fromarray(random.randint(0, 60, (size, size, 3)).astype("uint8"))
    mask = Image.new("L", (size, size))
    shapes = []
    for left in (4, size // 2 + 4):  # one in each half, so that none covers another
        if shapes and random.rand() < 0.3:
            continue
        side = random.randint(size // 4, size // 2 - 8)
        x = left + random.randint(0, size // 2 - 7 - side)
        y = random.randint(2, size - side - 2)
        label = random.randint(2)
        box = (x, y, x + side, y + side)
        colour = tuple(random.randint(140, 256, 3).tolist())
        for pen, fill in ((ImageDraw.Draw(image), colour), (ImageDraw.Draw(mask), label + 1)):
            (pen.ellipse if label == 0 else pen.rectangle)(box, fill=fill)
        shapes.append((label, box))
    return image, mask, shapes


def _outline(label: int, box: tuple[int, ...]) -> list[float]:
    left, top, right, bottom = box
    if label == 1:
        return [left, top, right, top, right, bottom, left, bottom]
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x = (left + right) / 2 + (right - left) / 2 * np.cos(angles)
    y = (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angles)
    return np.stack((x, y), 1).ravel().round(1).tolist()


def write_coco(folder: Path, images: int, seed: int = 0) -> Path:
    """folder/images/*.png and folder/annotations.json"""
    random = np.random.RandomState(seed)
    (folder / "images").mkdir(parents=True)
    entries, annotations = [], []
    for index in range(images):
        image, _, shapes = draw(random)
        image.save(folder / "images" / f"{index}.png")
        size = {"width": image.width, "height": image.height}
        entries.append({"id": index, "file_name": f"{index}.png", **size})
        for label, box in shapes:
            side = box[2] - box[0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [box[0], box[1], side, side],
                    "area": side * side,
                    "iscrowd": 0,
                    "segmentation": [_outline(label, box)],
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def write_masks(folder: Path, images: int, seed: int = 0) -> Path:
    """folder/images/*.png and folder/masks/*.png, whose values are classes"""
    random = np.random.RandomState(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index in range(images):
        image, mask, _ = draw(random)
        image.save(folder / "images" / f"{index}.png")
        mask.save(folder / "masks" / f"{index}.png")
    return folder
