"""A small data set for tests: drawings of circles, crosses and triangles, 64 pixels wide."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "cross", "triangle")


def draw(shape: str, random: np.random.RandomState, size: int = 64) -> Image.Image:
    """One outline of random place, size, width and light colour on a dark, noisy ground."""
    ink = random.randint(150, 256, 3)
    image = Image.fromarray(random.randint(0, 40, (size, size, 3)).astype("uint8"))
    radius = random.randint(size // 4, 3 * size // 8)
    x, y = random.randint(radius + 2, size - radius - 2, 2)
    left, right, top, bottom = x - radius, x + radius, y - radius, y + radius
    lines = {
        "cross": [[(left, top), (right, bottom)], [(left, bottom), (right, top)]],
        "triangle": [[(left, bottom), (x, top), (right, bottom), (left, bottom)]],
    }
    pen, colour, width = ImageDraw.Draw(image), tuple(ink), random.randint(4, 8)
    for line in lines.get(shape, []):
        pen.line(line, fill=colour, width=width)
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), outline=colour, width=width)
    return image


def write_drawings(folder: Path, images_per_class: int, seed: int = 0) -> Path:
    """folder/<class>/<index>.png"""
    random = np.random.RandomState(seed)
    for shape in CLASSES:
        (folder / shape).mkdir(parents=True)
        for index in range(images_per_class):
            draw(shape, random).save(folder / shape / f"{index:03d}.png")
    return folder
