"""The one exception for what a user can put right."""

import difflib
from argparse import Namespace
from collections.abc import Iterable


class UserError(Exception):
    """A wrong path, flag or file. Its text says what is wrong, where, and what to do, in one line.

    `main.py` prints that line without a traceback and exits with status 1.
    """


class MissingPackageError(UserError):
    """What was asked for needs a package that is not installed."""


def near_names(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends in: up to three known ones like it, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; near names: {', '.join(near)}" if near else ""


def reason_of(error: BaseException, most: int = 300) -> str:
    """The text of a library's error in one line of at most that many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def check_positive(arguments: Namespace, *names: str) -> None:
    """Raises UserError where one of these arguments is given and below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: has to be at least 1")
