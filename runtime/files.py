"""Files and folders that are written completely or not at all, and checksum files beside them."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from runtime.errors import UserError

RUN_LOCK = ".lock"
"""Name of the file that a run locks in its folder; it begins with 'process'."""
FORGOTTEN = "forgotten"
"""Folder in that of a run for what is later than the checkpoint that it went back to."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path, for a file or a folder, that is renamed to `path` on success.

    Other files that the body writes beside it get their places in the same way. Everything is
    flushed to disk before the renaming, so neither an error nor a kill damages what was there; a
    kill leaves a hidden folder '*.tmp'.

    Raises:
        UserError: it can't be written.
    """
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
            yield Path(folder) / path.name
            for file in Path(folder).rglob("*"):
                with suppress(OSError) if file.is_dir() else nullcontext():
                    _flush(file)
            for written in Path(folder).iterdir():
                written.replace(path.parent / written.name)
            with suppress(OSError):  # some network file systems cannot flush folders
                _flush(path.parent)
    except OSError as error:  # also from the body, which only writes there
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_table(path: str | Path, columns: Sequence[str], flag: str) -> IO[str]:
    """Open a CSV file to add rows with these columns; a new one gets its header.

    Raises UserError, which names the `flag`, if it has other columns or cannot be written.
    """
    header = ",".join(columns)
    try:
        file = Path(path).open("a+", newline="", encoding="utf-8")  # noqa: SIM115 - the caller's
        file.seek(0)
        content = file.read()
        first, *_ = content.splitlines() or [""]
        if not content:
            file.write(f"{header}\n")
        elif first != header:
            file.close()
            raise UserError(f"{flag} {path} has other columns than {header}")
        elif not content.endswith("\n"):
            file.write("\n")
        return file
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be written: {error}") from None


def write_table(path: Path, lines: Iterable[tuple]) -> None:
    """Write a CSV file, and its folder; UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", errors="surrogateescape") as file:
            csv.writer(file).writerows(lines)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def checksum_line(path: Path, name: str) -> str:
    """Return the content of the checksum file of `path` under its final name."""
    return f"{_sha256(path)}  {name}\n"


def matches_checksum(path: Path) -> bool:
    """Return whether a file matches its checksum; True without a checksum."""
    checksum = checksum_file(path)
    words = checksum.read_text(errors="replace").split() if checksum.is_file() else []
    return not words or words[0] == _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def holds_run(folder: Path) -> bool:
    """Return whether a folder is the output_dir of a run."""
    try:
        return (folder / RUN_LOCK).read_bytes().startswith(b"process ")
    except OSError:
        return False


def check_compiler_cache() -> None:
    """Raise UserError if torch.compile's cache folder can't be made: imports would fail later."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        if folder:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"TORCHINDUCTOR_CACHE_DIR={folder} cannot be made: {error}") from None
