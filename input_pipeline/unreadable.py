"""Unreadable images: listed in a file; too many of them end the run.

Training replaces each by another image of its class (loaders.TrainImages), evaluation leaves it out
(loaders.EvalImages). All loader workers share the file, and with an output_dir all ranks. The rank
that finds an image too many raises a UserError; the others then end with an error that names it
(runtime.distributed.naming_absent_ranks).
"""

import logging
import re
import tempfile
import uuid
from functools import cache
from pathlib import Path

from config.flags import Config
from runtime.errors import UserError

logger = logging.getLogger(__name__)

ENDS = re.compile(r"[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Characters that end a line, or the name in it."""


class UnreadableImages:
    """A file of at most `most` unreadable images, with one line and reason per image."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most

    @classmethod
    def of_run(cls, config: Config) -> "UnreadableImages":
        """Return bad_images.txt in output_dir, or in a temporary folder of this process."""
        output_dir = config.checkpoint.output_dir
        folder = Path(output_dir) if output_dir else _temporary_folder()
        return cls(folder / "bad_images.txt", config.faults.max_bad_images)

    def add(self, name: str, reason: str) -> None:
        """List an image, once; UserError if there are too many."""
        name = ENDS.sub("?", name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # file names may be any bytes; a short line is written at once
            with self.path.open("a+", errors="surrogateescape") as file:
                file.seek(0)
                # two processes may have listed the same image
                known = dict.fromkeys(line.split("\t")[0] for line in file.read().splitlines())
                if name not in known:
                    file.write(f"{name}\t{' '.join(reason.split())}\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None
        if not known:
            logger.warning("%s; it is listed in %s, like others that follow", reason, self.path)
        names = list(known | {name: None})
        if len(names) > self.most:
            raise UserError(
                f"{len(names)} images cannot be read, more than --max_bad_images {self.most}: "
                f"{', '.join(names[-3:])}; see {self.path}"
            )

    def tell(self) -> None:
        """Log how many images are listed, if any."""
        if self.path.is_file():
            with self.path.open(errors="surrogateescape") as file:
                count = len({line.split("\t")[0] for line in file})
            logger.warning("unreadable images until now: %d; see %s", count, self.path)


@cache
def _temporary_folder() -> Path:  # not made before something is written
    return Path(tempfile.gettempdir()) / f"hornet-{uuid.uuid4().hex[:12]}"
