"""The folder of a run:

    output_dir/
        config.yaml              all flags, as `--config` reads them
        log.txt                  one JSON object per epoch
        timing.txt               the same, of speed and hardware
        checkpoint-start.pth     before the first step
        checkpoint-<epoch>.pth   the newest save_ckpt_num, and epochs 50, 100, 150, ...
        checkpoint-<epoch>-<step>.pth   inside an epoch, after that step; the newest two
        checkpoint-best.pth      best accuracy of the model
        checkpoint-best-ema.pth  best accuracy of the EMA
        *.pth.sha256             the checksum of each, as `sha256sum --check` reads it
        forgotten/1, 2, ...      files later than the checkpoint that a run went back to
        bad_images.txt           unreadable images
        bad_step.json            the last of too many non-finite steps
        .lock                    locked by the run that writes here
        trackers.json            the last step sent to trackers, the run in Weights & Biases
        curves.png               at the end

A checkpoint holds tensors and plain values, which `torch.load(..., weights_only=True)` reads:
model, model_ema, optimizer, scaler, epoch (the last finished one, -1 for the start), step, position
(images of the current epoch used so far), max_accuracy, max_ema_accuracy, meters and bad_steps
(running sums), args (the flags), classes, versions, and wandb_id if there is one. With
--save_frozen false, model lacks what left_out names, with the 2-norm of each.
"""

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch

from checkpoints.reading import damage_of, read_checkpoint, size_of
from config.flags import CheckpointConfig, Config
from runtime.errors import UserError
from runtime.files import FORGOTTEN, RUN_LOCK, checksum_file, checksum_line, written_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's files, on rank 0 and with an output_dir only."""

    config: CheckpointConfig
    is_main: bool

    @property
    def path(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def writes(self) -> bool:
        return self.is_main and bool(self.config.output_dir)

    @property
    def saves(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.writes and self.config.save_ckpt

    def holds(self, path: str) -> bool:
        """Return whether a checkpoint is one of this run."""
        return bool(self.config.output_dir) and Path(path).resolve().parent == self.path.resolve()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}") from None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, and lock it against other runs in the body."""
        with ExitStack() as stack:
            with self._writing():
                if self.config.output_dir:  # on all ranks, so that all get an error
                    self.path.mkdir(parents=True, exist_ok=True)
                if self.writes:
                    _lock(stack.enter_context((self.path / RUN_LOCK).open("a+")))
            yield

    def begin(self, config: Config) -> None:
        """Save the flags, and remove what a killed save has left."""
        if not self.writes:
            return
        with self._writing():
            for path in self.path.glob(".*.tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            config.save(self.path / "config.yaml")

    def to_resume(self) -> str:
        """Return the checkpoint to resume: --resume, else the newest undamaged one, else ''.

        After a restart the newest one comes first, even with --resume.
        """
        given, searches = self.config.resume, self.config.output_dir and self.config.auto_resume
        if not searches or (given and not _is_restarted()):
            return given
        path = None
        for path in self._candidates():
            if not (damage := damage_of(path)):
                return str(path)
            logger.warning("skipped %s: %s", path, damage)
        if path and not given:
            logger.warning("no checkpoint of %s can be read: the run starts over", self.path)
        return given

    def _candidates(self) -> Iterator[Path]:
        newest_first = resumable(self.path)
        yield from newest_first
        if newest_first:  # all of them are damaged
            best = self.path.glob("checkpoint-best*.pth")
            yield from sorted(best, key=_saved_epoch, reverse=True)

    def log(self, record: dict[str, Any], name: str = "log.txt") -> None:
        """Append an epoch's record to log.txt, or another file; NaN and inf become null."""
        if self.writes:
            bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
            with self._writing(), (self.path / name).open("a") as file:
                file.write(json.dumps(record | dict.fromkeys(bad)) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def set_aside(self, resume_from: str, epoch: int) -> bool:
        """Move files and log records later than `resume_from` and its `epoch` to forgotten/.

        Returns whether there were later checkpoints: then the run takes another course from there.
        """
        if not self.writes:
            return False
        later = []
        for path in resumable(self.path):
            if path.resolve() == Path(resume_from).resolve() or _place(path) <= (epoch + 1, 0):
                break
            later.append(path)
        if later:
            later += [p for p in self.path.glob("checkpoint-best*.pth") if _saved_epoch(p) > epoch]
        log, forgotten = self.path / "log.txt", self.path / FORGOTTEN
        with self._writing():
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            kept = [line for line in lines if _epoch_of(line) <= epoch]
            if not later and kept == lines:
                return False
            aside = next(p for n in count(1) if not (p := forgotten / str(n)).exists())
            aside.mkdir(parents=True)
            logger.info("files and records later than epoch %d are moved to %s", epoch, aside)
            for path in (*later, *map(checksum_file, later)):
                if path.exists():
                    path.replace(aside / path.name)
            if kept != lines:
                rest = [line for line in lines if line not in kept]
                (aside / "log.txt").write_text("".join(f"{line}\n" for line in rest))
                with written_whole(log) as path:
                    path.write_text("".join(f"{line}\n" for line in kept))
        return bool(later)

    def report(self, facts: dict[str, Any]) -> str:
        """Write bad_step.json; return its path, or '' if nothing is written."""
        if not self.writes:
            return ""
        path = self.path / "bad_step.json"
        with self._writing():
            path.write_text(json.dumps(facts, indent=1))
        return str(path)

    def save_step(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Save inside an epoch; the newest two such files are kept."""
        if self.saves:
            self.save(state, f"{epoch}-{step}")
            _remove(_inside_epochs(self.path)[2:])

    def save_epoch(self, state: dict[str, Any], epoch: int, is_last: bool) -> None:
        """Save every save_ckpt_freq epochs and after the last; remove older files."""
        if self.saves and ((epoch + 1) % self.config.save_ckpt_freq == 0 or is_last):
            self.save(state, str(epoch))
            remove_old(self.path, self.config.save_ckpt_num)
            _remove(_inside_epochs(self.path))

    def save(self, state: dict[str, Any], name: str) -> None:
        if self.saves:
            save_checkpoint(state, self.path / f"checkpoint-{name}.pth")


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint completely or not at all; UserError if that fails."""
    with written_whole(path) as temporary:
        needed, free = size_of(state), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(f"it takes {needed:,} bytes, {free:,} are free")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch's own for a file that refuses bytes
            raise OSError(str(error)) from None
        line = checksum_line(temporary, path.name)
        # from here on a kill leaves the old file or the new one, at worst without a checksum
        checksum_file(path).unlink(missing_ok=True)
    with written_whole(checksum_file(path)) as temporary:
        temporary.write_text(line)


def resumable(folder: Path) -> list[Path]:
    """Return the numbered checkpoints and those from inside an epoch, newest first."""

    def age(path: Path) -> tuple[int, bool, int, int]:
        epoch, step = _place(path)
        # steps of different total batches can't be compared
        return epoch, step > 0, path.stat().st_mtime_ns, step

    files = [path for path in folder.glob("checkpoint-*.pth") if _place(path)[0] >= 0]
    return sorted(files, key=age, reverse=True)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and but epochs 50, 100, 150, ..."""
    ends = [path for path in resumable(folder) if _place(path)[1] == 0]
    epochs = {path: _place(path)[0] - 1 for path in ends[keep:]}
    _remove([path for path, epoch in epochs.items() if epoch == 0 or epoch % 50])


def _inside_epochs(folder: Path) -> list[Path]:
    return [path for path in resumable(folder) if _place(path)[1]]


def _place(path: Path) -> tuple[int, int]:
    """Return (current epoch, step) by the name of a checkpoint; (-1, 0) for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-(\d+))?\.pth", path.name)
    if not match:
        return -1, 0
    return (int(match[1]), int(match[2])) if match[2] else (int(match[1]) + 1, 0)


def _saved_epoch(path: Path) -> float:
    """Return the epoch in a checkpoint; infinity if it can't be read."""
    try:
        return float(read_checkpoint(path)["epoch"])
    except (UserError, KeyError, TypeError, ValueError):
        return math.inf


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of log.txt; infinity for an incomplete line."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        checksum_file(path).unlink(missing_ok=True)


def _is_restarted() -> bool:
    """Return whether torchrun or Slurm has restarted this process."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) for name in counts)


def _lock(file: IO[str]) -> None:
    """Lock a file until it is closed; UserError if another process has locked it.

    Loader workers don't inherit POSIX locks, so a killed run leaves none. On a network file system
    a crashed machine may leave one, so restarted runs ignore it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if _is_restarted() or error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked against other runs: %s", file.name, error)
            return
        file.seek(0)
        raise UserError(
            f"another run writes to --output_dir {Path(file.name).parent} ({file.read().strip()}): "
            "wait until it ends, or give another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
