"""The one exception for what a user can put right, and how a program ends with it."""

import difflib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A wrong path, flag or file. Its text says what is wrong, where, and what to do, in one line.

    Programs print that line without a traceback and exit with status 1.
    """


class MissingPackageError(UserError):
    """A feature needs a package that is not installed."""


def run_program(name: str, body: Callable[[], int]) -> int:
    """The exit status of a program: that of its body, 1 after an error, 130 after Ctrl-C."""
    try:
        return body()
    except (UserError, OSError) as error:
        sys.stderr.write(f"{name}: error: {one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped\n")
        return 130


def one_line(error: BaseException) -> str:
    """The text of an error in one line, without the traceback that loader workers prepend."""
    message = str(error).rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(message.split())


def near_names(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: up to three known names like it, or nothing."""
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
