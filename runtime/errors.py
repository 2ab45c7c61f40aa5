"""The one exception for what a user can put right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong path, flag or file. Its text says what is wrong, where, and what to do, in one line.

    `main.py` prints that line without a traceback and exits with status 1.
    """


def near_names(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends in: up to three known ones like it, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; near names: {', '.join(near)}" if near else ""
