"""Files and folders that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write at, which becomes `path`, a file or a folder, if the body ends without error.

    What the body writes beside it moves along. All of it is flushed to the disk before it gets its
    name, so that neither an error nor a kill damages what was there; a kill leaves a hidden folder
    whose name ends in .tmp.

    Raises:
        UserError: it can't be written.
    """
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
            yield Path(folder) / path.name
            for file in Path(folder).rglob("*"):
                _flush(file)
            for written in Path(folder).iterdir():
                written.replace(path.parent / written.name)
            _flush(path.parent)
    except OSError as error:  # of the body too, which does nothing with files but write there
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
