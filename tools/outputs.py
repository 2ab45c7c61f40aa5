"""Files that programs write: whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.errors import UserError


@contextmanager
def kept_when_done(output: Path) -> Iterator[Path]:
    """A path to write what is to be `output`, a file or a folder.

    It, and all beside it, moves there once the body has ended without an error; else it is removed.

    Raises:
        UserError: `output` cannot be written.
    """
    try:
        with TemporaryDirectory(dir=output.parent, prefix=".unfinished-") as folder:
            yield Path(folder) / output.name
            for path in Path(folder).iterdir():
                os.replace(path, output.parent / path.name)
    except OSError as error:  # in the body too, which does nothing with files but write there
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None
