"""Names of files and classes as text that pages and pictures can show."""

import os
from functools import cache
from pathlib import Path
from typing import Any

FONT = Path("fonts/ttf/DejaVuSans.ttf")
"""matplotlib's default font, in its folder of data."""


def as_unicode(name: str | Path) -> str:
    """Return a name as valid Unicode, with other bytes as \\xHH."""
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str | Path) -> str:
    """Return a name as valid Unicode in one line, with other bytes as \\xHH."""
    text = as_unicode(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def drawable(names: list[str]) -> list[str]:
    """Return class names as pictures show them: by number if the font lacks a character."""
    return [text if _has_glyphs(text) else f"#{i}" for i, text in enumerate(map(printable, names))]


def font_file() -> Path:
    # imported late: it takes a second
    import matplotlib

    return Path(matplotlib.get_data_path()) / FONT


def _has_glyphs(text: str) -> bool:
    return all(_font().get_char_index(ord(character)) for character in text)


@cache
def _font() -> Any:
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(font_file()))
