"""UserError, for what a user can correct, and how programs report it."""

import difflib
import io
import os
import signal
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A wrong path, flag or file; the message says what is wrong, where, and what to do.

    Programs print it as one line, without a traceback, and exit with status 1.
    """


class MissingPackageError(UserError):
    """A feature needs a package that isn't installed."""


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """End the process with one line and status 1 on a UserError in the body."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: error: {one_line(error)}")


def program(
    parser: Callable[[], ArgumentParser],
) -> Callable[[Callable[[Namespace], int | None]], Callable[..., int]]:
    """Turn a function of the parsed arguments into main(argv), which returns the exit status.

    The status is that of the function, 0 for None; 1 on error, 130 on Ctrl-C.
    """

    def decorate(body: Callable[[Namespace], int | None]) -> Callable[..., int]:
        def main(argv: list[str] | None = None) -> int:
            this = parser()
            name = this.prog.removeprefix("python -m ")
            print_any_name()
            # like Ctrl-C, so that no temporary files are left; a thread cannot set it
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, _end)
            try:
                arguments = this.parse_args(argv)
                for key, value in vars(arguments).items():
                    if isinstance(value, str | Path) and str(value).startswith("~"):
                        setattr(arguments, key, type(value)(os.path.expanduser(value)))
                return body(arguments) or 0
            except (UserError, OSError) as error:
                sys.stderr.write(f"{name}: error: {one_line(error)}\n")
                return 1
            except KeyboardInterrupt:
                sys.stderr.write(f"{name}: stopped\n")
                return 130

        return main

    return decorate


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


class Parser(ArgumentParser):
    """Argparse's, which reports a mistake as one line instead of its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def print_any_name() -> None:
    """Let names of files that are not UTF-8 be printed as they are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def one_line(error: BaseException) -> str:
    """Return an error's message as one line, without the traceback that loader workers prepend."""
    message = str(error).rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(message.split())


def near_names(name: str, known: Iterable[str]) -> str:
    """Return up to three names similar to an unknown one, as the end of a message; or ''."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; near names: {', '.join(near)}" if near else ""


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first of several names for a message; 'none' without any."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"


def reason_of(error: BaseException, most: int = 300) -> str:
    """Return a library's error message as one line of at most that many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def check_positive(arguments: Namespace, *names: str) -> None:
    """Raise UserError if one of these arguments is given and below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: has to be at least 1")
