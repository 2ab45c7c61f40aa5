"""Images that cannot be read: listed in a file, and too many of them end the run.

In training, one of them is replaced by another image of its class (loaders.TrainImages); in an
evaluation it does not count (loaders.EvalImages). All ranks and loader workers share the list, and
the one that finds one image too many raises the error, which ends the run on all ranks.
"""

import tempfile
import uuid
from functools import cache
from pathlib import Path

from config import Config
from runtime.errors import UserError


class UnreadableImages:
    """The list of images that cannot be read.

    Args:
        path: The file, bad_images.txt of a run: one line per image, with the reason.
        most: How many there may be.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most

    @classmethod
    def of_run(cls, config: Config) -> "UnreadableImages":
        """The list in the run's output_dir; without one, in a temporary file of this process."""
        output_dir = config.checkpoint.output_dir
        folder = Path(output_dir) if output_dir else _temporary_folder()
        return cls(folder / "bad_images.txt", config.faults.max_bad_images)

    def add(self, name: str, reason: str) -> None:
        """Lists an image, once; raises UserError where there are too many."""
        try:
            text = ""
            if self.path.exists():
                text = self.path.read_text(errors="surrogateescape")  # any name of a file
            known = text.splitlines()
            if name not in {line.split("\t")[0] for line in known}:
                known.append(f"{name}\t{' '.join(reason.split())}")
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # a short line is written whole
                with self.path.open("a", errors="surrogateescape") as file:
                    file.write(known[-1] + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None
        # several processes may have listed the same image
        names = list(dict.fromkeys(line.split("\t")[0] for line in known))
        if len(names) > self.most:
            raise UserError(
                f"{len(names)} images cannot be read, more than --max_bad_images {self.most}: "
                f"{', '.join(names[-3:])}, and all others in {self.path}"
            )


@cache
def _temporary_folder() -> Path:
    # made when there is something to write
    return Path(tempfile.gettempdir()) / f"hornet-{uuid.uuid4().hex[:12]}"
