"""The folder of a run:

    output_dir/
        config.yaml              every flag, as `--config` reads it back
        log.txt                  one JSON object per epoch
        checkpoint-start.pth     before the first step
        checkpoint-<epoch>.pth   the newest save_ckpt_num, and epochs 50, 100, 150, ...
        checkpoint-<epoch>-<step>.pth   inside that epoch, after so many steps; the newest two
        checkpoint-best.pth      best accuracy of the model
        checkpoint-best-ema.pth  best accuracy of its EMA
        *.pth.sha256             the checksum of each, as `sha256sum --check` reads it
        forgotten/1, 2, ...      what came after the checkpoint that a run went back to
        bad_images.txt           images that could not be read
        bad_step.json            the last non-finite step, where there were too many
        .lock                    locked by the run that writes here
        curves.png               at the end

A checkpoint holds tensors and plain values only (`torch.load(..., weights_only=True)` reads it):
model, model_ema, optimizer, scaler, epoch (the last one finished, -1 for the start), step,
position (images of the next epoch that have been used), max_accuracy, max_ema_accuracy, meters and
bad_steps (running sums), args (the flags), classes and versions. A file without a checksum is taken
as it is.
"""

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from checkpoints.checksums import checksum_file, checksum_line
from checkpoints.reading import damage_of, read_checkpoint, size_of
from config import CheckpointConfig, Config
from runtime.errors import UserError
from runtime.files import written_whole

# above 0 in a process that torchrun or Slurm has started again
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's files on rank 0; without an output_dir, and on other ranks, nothing."""

    config: CheckpointConfig
    is_main: bool

    @property
    def path(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def writes(self) -> bool:
        """Whether this process writes to the folder."""
        return self.is_main and bool(self.config.output_dir)

    @property
    def saves(self) -> bool:
        """Whether it writes checkpoints."""
        return self.writes and self.config.save_ckpt

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}") from None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it in the body, which may read from it.

        On every rank, so that all of them see an error.
        """
        with ExitStack() as stack:
            with self._writing():
                if self.config.output_dir:
                    self.path.mkdir(parents=True, exist_ok=True)
                if self.writes:
                    _lock(stack.enter_context((self.path / ".lock").open("a+")))
            yield

    def begin(self, config: Config) -> None:
        """Notes the flags, and removes what a killed save has left."""
        if not self.writes:
            return
        with self._writing():
            for path in self.path.glob(".*.tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            config.save(self.path / "config.yaml")

    def to_resume(self) -> str:
        """What a run resumes from: --resume if given, else the folder's newest file, else ''.

        A restarted run resumes from the newest file even so. Damaged ones are passed over.
        """
        if not (self.config.output_dir and self.config.auto_resume):
            return self.config.resume
        if self.config.resume and not _is_restarted():
            return self.config.resume
        path = None
        for path in self._resumable():
            damage = damage_of(path)
            if not damage:
                return str(path)
            logger.warning("%s is passed over: %s", path, damage)
        if path and not self.config.resume:
            logger.warning("no checkpoint of %s can be read: the run starts over", self.path)
        return self.config.resume

    def _resumable(self) -> Iterator[Path]:
        """The numbered checkpoints, newest first; if there are any, the best ones after them."""
        numbered = resumable(self.path)
        yield from numbered
        if numbered:
            best = self.path.glob("checkpoint-best*.pth")
            yield from sorted(best, key=_saved_epoch, reverse=True)

    def log(self, record: dict[str, Any]) -> None:
        """Adds an epoch's record to log.txt, where NaN and inf become null."""
        if self.writes:
            with self._writing(), (self.path / "log.txt").open("a") as file:
                file.write(json.dumps(_without_nan(record)) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def set_aside(self, resume_from: str, epoch: int) -> None:
        """Moves what comes after the start of this run to forgotten/: it goes another way now.

        That is checkpoints newer than `resume_from`, the best ones of epochs beyond `epoch`, and
        the records of log.txt beyond it.
        """
        if not self.writes:
            return
        newer = []
        for path in resumable(self.path):
            if path.resolve() == Path(resume_from).resolve() or _place(path) <= (epoch + 1, 0):
                break
            newer.append(path)
        if newer:
            best = self.path.glob("checkpoint-best*.pth")
            newer += [path for path in best if _saved_epoch(path) > epoch]
        log, number = self.path / "log.txt", 1
        while (aside := self.path / "forgotten" / str(number)).exists():
            number += 1
        with self._writing():
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            kept = [line for line in lines if _epoch_of(line) <= epoch]
            if newer or len(kept) < len(lines):
                aside.mkdir(parents=True)
                logger.info("what came after epoch %d is moved to %s", epoch, aside)
            for path in newer:
                path.replace(aside / path.name)
                if checksum_file(path).exists():
                    checksum_file(path).replace(checksum_file(aside / path.name))
            if len(kept) < len(lines):
                rest = "".join(f"{line}\n" for line in lines if line not in kept)
                (aside / "log.txt").write_text(rest)
                with written_whole(log) as path:
                    path.write_text("".join(f"{line}\n" for line in kept))

    def report(self, facts: dict[str, Any]) -> str:
        """Writes bad_step.json; its path, or '' where nothing is written."""
        if not self.writes:
            return ""
        path = self.path / "bad_step.json"
        with self._writing():
            path.write_text(json.dumps(facts, indent=1))
        return str(path)

    def save_step(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Saves inside an epoch, and keeps the newest two such files."""
        if self.saves:
            self.save(state, f"{epoch}-{step}")
            _remove(_inside_epochs(self.path)[:-2])

    def save_epoch(self, state: dict[str, Any], epoch: int, is_last: bool) -> None:
        """Saves where save_ckpt_freq says so, and after the last epoch; removes old ones."""
        if self.saves and ((epoch + 1) % self.config.save_ckpt_freq == 0 or is_last):
            self.save(state, str(epoch))
            remove_old(self.path, self.config.save_ckpt_num)
            _remove(_inside_epochs(self.path))

    def save(self, state: dict[str, Any], name: str) -> None:
        if self.saves:
            save_checkpoint(state, self.path / f"checkpoint-{name}.pth")


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint whole or not at all; raises UserError where the folder refuses it."""
    needed, free = size_of(state), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(f"{path} cannot be written: it takes {needed:,} bytes, {free:,} are free")
    with written_whole(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch's own for a file that refuses bytes
            raise OSError(str(error)) from None
        line = checksum_line(temporary, path.name)
        # a kill from here on leaves a whole file, with its own checksum or with none
        checksum_file(path).unlink(missing_ok=True)
    with written_whole(checksum_file(path)) as temporary:
        temporary.write_text(line)


def resumable(folder: Path) -> list[Path]:
    """The numbered checkpoints and those from inside an epoch, newest first."""

    def age(path: Path) -> tuple[int, bool, int, int]:
        epoch, step = _place(path)
        # with another total batch the steps of a run have other numbers
        return epoch, step > 0, path.stat().st_mtime_ns, step

    files = [path for path in folder.glob("checkpoint-*.pth") if _place(path)[0] >= 0]
    return sorted(files, key=age, reverse=True)


def remove_old(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep`, sparing epochs that are multiples of 50, but not 0."""
    old = list(numbered(folder).items())[:-keep]
    _remove([path for epoch, path in old if epoch == 0 or epoch % 50])


def numbered(folder: Path) -> dict[int, Path]:
    """Epoch -> file of the numbered checkpoints, oldest first."""
    places = {_place(path): path for path in reversed(resumable(folder))}
    return {epoch - 1: path for (epoch, step), path in places.items() if not step}


def _inside_epochs(folder: Path) -> list[Path]:
    """The checkpoints from inside an epoch, oldest first."""
    return [path for path in reversed(resumable(folder)) if _place(path)[1]]


def _place(path: Path) -> tuple[int, int]:
    """(epoch in progress, step) of a numbered checkpoint; (-1, 0) for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-(\d+))?\.pth", path.name)
    if not match:
        return -1, 0
    return (int(match[1]), int(match[2])) if match[2] else (int(match[1]) + 1, 0)


def _saved_epoch(path: Path) -> float:
    """The epoch that a checkpoint holds; infinity for one that cannot be read."""
    try:
        return float(read_checkpoint(path)["epoch"])
    except (UserError, KeyError, TypeError, ValueError):
        return math.inf


def _epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that was cut off."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        checksum_file(path).unlink(missing_ok=True)


def _is_restarted() -> bool:
    """Whether torchrun or Slurm has started this process again."""
    return any(int(os.environ.get(name) or 0) for name in RESTARTS)


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _lock(file: IO[str]) -> None:
    """Locks a file until it is closed; raises UserError where another process has it.

    The lock is one of POSIX, which loader workers do not inherit: a killed run leaves none. Only a
    machine that has crashed may, on a network file system; so a restarted run ignores the lock.
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
            "wait for its end, or give another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
