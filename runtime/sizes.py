"""Sizes of images: the side of a square, or height and width."""

from typing import Any

Size = int | tuple[int, int]
"""Side of a square, or height and width, in pixels."""


def sides(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


def as_size(value: Any) -> Size:
    """Return the size that a file tells as a number or a list; ValueError if it is none."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"input size {value!r}")
    height, width = numbers[0], numbers[-1]
    return height if height == width else (height, width)


def size_text(size: Size) -> str:
    """Return `224`, or `224 x 320`."""
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))
