"""The folder of a run:

    output_dir/
        config.yaml              every flag, as `--config` reads it back
        log.txt                  one JSON object an epoch
        checkpoint-start.pth     before the first step
        checkpoint-<epoch>.pth   the newest save_ckpt_num, and epochs 50, 100, 150, ...
        checkpoint-<epoch>-<step>.pth   inside that epoch, after so many steps; the newest two
        checkpoint-best.pth      best accuracy of the model
        checkpoint-best-ema.pth  best accuracy of its moving average
        *.pth.sha256             the checksum of each, as `sha256sum --check` reads it
        forgotten/1, 2, ...      what came after the checkpoint that a run went back to
        bad_images.txt           images that could not be read
        bad_step.json            where too many gradients were not finite: the last such step
        .lock                    locked by the run that writes here
        curves.png               at the end

A checkpoint holds tensors and plain values only (`torch.load(..., weights_only=True)` reads it):
model, model_ema, optimizer, scaler, epoch (the last one finished, -1 for the start), step,
position (images of the next epoch that have been used), max_accuracy, max_ema_accuracy, meters and
bad_steps (running sums), args (the flags), classes and versions. It is written under a
temporary name, flushed to the disk, and renamed, so that a kill never damages a finished file. A
file without a checksum is taken as it is.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import IO, Any, BinaryIO

import torch
from safetensors import safe_open

from config import CheckpointConfig, Config, FinetuneConfig
from runtime import timm_folder
from runtime.errors import UserError

# the flags in released checkpoints are a Namespace, in Slurm runs with paths, whose class has moved
RELEASED_FLAGS: list[Any] = [
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
]
# above 0 in a process that torchrun or Slurm has started again
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
MODEL_KEY = FinetuneConfig.model_key
# weights, their average and two moments of an optimizer are four times the model
MOST_TIMES = 10
METADATA = "hornet"
"""Under which a .safetensors file may have the rest of a checkpoint (args, classes), as JSON."""
SMALL = 2**24
"""Bytes that the file of the smallest model may have."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's files on the main process; without an output_dir, and elsewhere, nothing."""

    config: CheckpointConfig
    is_main: bool

    @property
    def path(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def saves(self) -> bool:
        return self.is_main and bool(self.config.output_dir)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it in the body, which may read from it.

        On every process, so that all of them see an error.
        """
        with ExitStack() as stack:
            try:
                if self.config.output_dir:
                    self.path.mkdir(parents=True, exist_ok=True)
                if self.saves:
                    _lock(stack.enter_context((self.path / ".lock").open("a+")))
            except OSError as error:
                raise UserError(f"--output_dir {self.path} cannot be written: {error}") from None
            yield

    def begin(self, config: Config) -> None:
        """Notes the flags, and removes what a killed save has left."""
        try:
            if self.saves:
                for path in self.path.glob(".*.tmp"):  # of a save that was killed
                    path.unlink()
                config.save(self.path / "config.yaml")
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}") from None

    def to_resume(self) -> str:
        """What a run goes on from: --resume if given, else the folder's newest file, else ''.

        A run that was restarted goes on from the newest file even so. Damaged ones are passed over.
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
            logger.warning("no checkpoint of %s can be read: the run starts anew", self.path)
        return self.config.resume

    def _resumable(self) -> Iterator[Path]:
        """The numbered checkpoints, newest first; if there are any, the best ones after them."""
        numbered = resumable(self.path)
        yield from numbered
        if numbered:
            best = self.path.glob("checkpoint-best*.pth")
            yield from sorted(best, key=_saved_epoch, reverse=True)

    def log(self, record: dict[str, Any]) -> None:
        """Adds an epoch's record to log.txt; numbers that are none are null there."""
        if self.saves:
            try:
                with (self.path / "log.txt").open("a") as file:
                    file.write(json.dumps(_without_nan(record)) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{self.path}/log.txt cannot be written: {error}") from None

    def set_aside(self, resume_from: str, epoch: int) -> None:
        """Moves what comes after the start of this run to forgotten/: it goes another way now.

        That is checkpoints newer than `resume_from`, the best ones of epochs beyond `epoch`, and
        the records of log.txt beyond it.
        """
        if not self.saves:
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
        try:
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
                with _in_place_of(log) as file:
                    file.writelines(f"{line}\n".encode() for line in kept)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}") from None

    def report(self, facts: dict[str, Any]) -> str:
        """Writes bad_step.json; its path, or '' where nothing is saved."""
        if not self.saves:
            return ""
        path = self.path / "bad_step.json"
        try:
            path.write_text(json.dumps(facts, indent=1))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from None
        return str(path)

    def save_step(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Saves inside an epoch, and keeps the newest two such files."""
        self.save(state, f"{epoch}-{step}")
        if self.saves and self.config.save_ckpt:
            for path in _inside_epochs(self.path)[:-2]:
                _remove(path)

    def save(self, state: dict[str, Any], name: str) -> None:
        if self.saves and self.config.save_ckpt:
            save(state, self.path / f"checkpoint-{name}.pth")

    def save_epoch(self, state: dict[str, Any], epoch: int, is_last: bool) -> None:
        """Saves where save_ckpt_freq says so, and after the last epoch; removes old ones."""
        if (epoch + 1) % self.config.save_ckpt_freq == 0 or is_last:
            self.save(state, str(epoch))
            if self.saves and self.config.save_ckpt:
                remove_old(self.path, self.config.save_ckpt_num)
                for path in _inside_epochs(self.path):
                    _remove(path)


def _is_restarted() -> bool:
    """Whether torchrun or Slurm has started this process again."""
    return any(int(os.environ.get(name) or 0) for name in RESTARTS)


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinities."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _lock(file: IO[str]) -> None:
    """Locks a file until it is closed; raises UserError where another process has it.

    The lock is one of POSIX, which loader processes do not inherit: a killed run leaves none. Only
    a machine that has broken down may, on a network file system; so a restarted run goes on.
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


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint whole or not at all; raises UserError where the folder refuses it."""
    try:
        needed, free = _size_of(state), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(f"it takes {needed:,} bytes, the disk has {free:,} left")
        with _in_place_of(path) as file:
            torch.save(state, file)
            file.flush()
            line = f"{_sha256(Path(file.name))}  {path.name}\n"
            # a kill from here on leaves a whole file, with its own checksum or with none
            checksum_file(path).unlink(missing_ok=True)
        with _in_place_of(checksum_file(path)) as file:
            file.write(line.encode())
    except (OSError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} could not be written: {error}") from None


@contextmanager
def _in_place_of(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` once it is written and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_of(value: Any) -> int:
    """Bytes of the tensors in a state."""
    if torch.is_tensor(value):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value
    return sum(map(_size_of, inner)) if isinstance(value, dict | list | tuple) else 0


def checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _has_its_checksum(path: Path) -> bool:
    """Whether a file is as its checksum says; one without any is."""
    checksum = checksum_file(path)
    words = checksum.read_text(errors="replace").split() if checksum.is_file() else []
    return not words or words[0] == _sha256(path)


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is known to be."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        if checksum_file(path).is_file() and checksum_file(path).stat().st_size:
            return "" if _has_its_checksum(path) else "it differs from its checksum"
        read(path)  # nothing but trying tells
    except OSError as error:
        return str(error)
    except UserError as error:
        return str(error).partition("cannot be read: ")[2] or str(error)
    return ""


def load(path: str | Path, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """A checkpoint on the CPU; one of bare weights, or of an average alone, has them as 'model'.

    Raises as `read`.
    """
    state = read(path, model)
    weights = find_weights(state, path)
    return {"model": weights} if weights is state else state | {"model": weights}


def find_weights(
    state: dict[str, Any], path: str | Path, keys: str = MODEL_KEY, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint read from `path`: under the first of `keys` ('a|b') it has.

    Unless other keys are asked for than the usual ones, bare weights and those of an average alone
    are taken too. Names that begin with `prefix` lose it; if there is one, the others are left out.
    """
    weights = next((state[key] for key in keys.split("|") if key in state), None)
    if weights is None and keys == MODEL_KEY:
        # of an average alone, of a detector or segmentor, or bare
        weights = next((state[key] for key in ("model_ema", "state_dict") if key in state), state)
    if not isinstance(weights, dict) or not _are_weights(weights):
        raise UserError(f"checkpoint {path} has no weights under --model_key {keys}")
    if prefix:
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not weights:
            raise UserError(f"checkpoint {path}: no name begins with --model_prefix {prefix}")
    return weights


def average_in(state: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor] | None:
    """The moving average in a checkpoint; None if it has none."""
    name = "state_dict_ema" if "state_dict_ema" in state else "model_ema"  # the first is timm's
    average = state.get(name)
    if not average:
        return None
    if not isinstance(average, dict) or not _are_weights(average):
        raise UserError(f"checkpoint {path}: its {name} are no weights")
    return average


def _are_weights(value: dict[str, Any]) -> bool:
    return bool(value) and all(
        isinstance(name, str)
        and torch.is_tensor(tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not tensor.is_quantized
        for name, tensor in value.items()
    )


def read(path: str | Path, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """The dict that a .pth or .safetensors file holds, on the CPU, without running its code.

    Of a folder in timm's form as if it were a checkpoint of that model.

    Raises UserError for a path or file that is none, one that differs from the checksum beside it,
    and one of over MOST_TIMES the size of `model`.
    """
    path = Path(path)
    if timm_folder.is_folder(path):
        return {"model": read(path / timm_folder.WEIGHTS, model), **timm_folder.read_config(path)}
    if not path.is_file():
        is_what = "is a folder; give a file of it" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {is_what}")
    try:
        _check_size(path, model)
        if not _has_its_checksum(path):
            raise UserError(
                f"checkpoint {path} cannot be read: it differs from its checksum; if you changed "
                f"it, remove {checksum_file(path)}"
            )
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    try:
        with torch.serialization.safe_globals(RELEASED_FLAGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refused pickle is told of below
            if path.suffix == ".safetensors":
                state = _read_safetensors(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for damaged files
        raise UserError(f"checkpoint {path} cannot be read: {_damage(path, error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} has no weights: it holds a {type(state).__name__}")
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        rest = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return {"model": weights, **rest} if rest else weights


def _check_size(path: Path, model: torch.nn.Module | None) -> None:
    """Refuses a file that would fill the memory before anything else is known of it."""
    size = unpacked = path.stat().st_size
    if zipfile.is_zipfile(path):  # safetensors and torch's oldest format are none
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except Exception as error:  # of half a dozen types for damaged files
            raise UserError(f"checkpoint {path} cannot be read: {_damage(path, error)}") from None
    if unpacked > MOST_TIMES * size:
        raise UserError(f"checkpoint {path} cannot be read: {size:,} bytes unpack to {unpacked:,}")
    own = _size_of(model.state_dict()) if model else math.inf
    if unpacked > MOST_TIMES * own + SMALL:
        raise UserError(
            f"checkpoint {path} is of another model: it takes {unpacked:,} bytes, the model {own:,}"
        )


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch or safetensors refuses."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "it is empty"
    if path.suffix != ".safetensors" and start not in (b"PK", b"\x80\x02"):
        return "it is no checkpoint of PyTorch"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors and plain values, which could run code"
    return f"it may be truncated ({(str(error).splitlines() or [type(error).__name__])[0]})"


def load_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    path: str | Path,
    may_lack: frozenset[str] = frozenset(),
) -> None:
    """Loads weights that have to fit exactly, and be finite; raises UserError that lists what not.

    Names in `may_lack` keep the model's own values where the weights have none.
    """
    check_fit(model.state_dict(), weights, path, may_lack)
    learnt = dict(model.named_parameters()).keys()
    bad = [
        name
        for name, value in weights.items()
        # masks among the buffers may be infinite
        if value.isnan().any() or (name in learnt and not value.isfinite().all())
    ]
    if bad:
        raise UserError(f"checkpoint {path} is of no use: not finite is {_first(bad)}")
    other = [name for name in learnt & weights.keys() if not weights[name].is_floating_point()]
    if other:
        raise UserError(f"checkpoint {path} is of no use: no floating point is {_first(other)}")
    model.load_state_dict(weights, strict=False)


def check_fit(
    expected: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    path: str | Path,
    may_lack: frozenset[str] = frozenset(),
) -> None:
    """Raises UserError that lists where `weights` differ from `expected` in names and shapes."""
    problems = {
        "lacks": sorted(expected.keys() - weights.keys() - may_lack),
        "has the unknown": sorted(weights.keys() - expected.keys()),
        "has another shape of": [
            f"{name} ({list(weights[name].shape)} instead of {list(value.shape)})"
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        shown = "; ".join(f"{what} {_first(names)}" for what, names in problems.items() if names)
        raise UserError(f"checkpoint {path} is of another model: it {shown}")


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def check_classes(state: dict[str, Any], classes: list[str], path: str | Path) -> None:
    """Refuses a checkpoint of other classes; one that does not name its classes passes."""
    saved = state.get("classes") or classes
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise UserError(f"checkpoint {path}: its classes are no list of names")
    numbers = [str(label) for label in range(len(classes))]
    if len(saved) == len(classes) and numbers in (saved, classes):
        return  # one of the data sets does not name its classes
    if saved != classes:
        raise UserError(
            f"checkpoint {path} knows {len(saved)} classes ({', '.join(saved[:5])}, ...), the data "
            f"has {len(classes)} ({', '.join(classes[:5])}, ...): start from its "
            "weights by --finetune, in another --output_dir"
        )


def saved_flags(state: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint: of this project, the release, or timm."""
    flags = state.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    if not isinstance(flags, dict):
        return {}
    if "img_size" in flags:  # timm's train.py, where None is the model's own
        size = flags.get("input_size") or flags["img_size"]
        size = size[-1] if isinstance(size, list | tuple) else size
        given = flags | {"input_size": size}
        flags = {name: value for name, value in given.items() if value not in (None, "")}
    return {name: value for name, value in flags.items() if not torch.is_tensor(value)}


def changed_flags(state: dict[str, Any], config: Config) -> list[str]:
    """`name old -> new` of every flag that is another than in the checkpoint."""
    saved, flat = saved_flags(state), config.flat()
    where = {"resume", "output_dir", "log_dir", "local_rank"}  # these name places, not a recipe
    return [
        f"{name} {saved[name]} -> {flat[name]}"
        for name in flat
        if name in saved and saved[name] != flat[name] and name not in where
    ]


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


def resumable(folder: Path) -> list[Path]:
    """The numbered checkpoints and those from inside an epoch, newest first."""

    def age(path: Path) -> tuple[int, bool, int, int]:
        epoch, step = _place(path)
        # with another total batch the steps of a run have other numbers
        return epoch, step > 0, path.stat().st_mtime_ns, step

    files = [path for path in folder.glob("checkpoint-*.pth") if _place(path)[0] >= 0]
    return sorted(files, key=age, reverse=True)


def _saved_epoch(path: Path) -> float:
    """The epoch that a checkpoint holds; infinity for one that cannot be read."""
    try:
        return float(read(path)["epoch"])
    except (UserError, KeyError, TypeError, ValueError):
        return float("inf")


def _epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that was cut off."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    checksum_file(path).unlink(missing_ok=True)


def remove_old(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep`, sparing epochs that are multiples of 50, but not 0."""
    for epoch, path in list(numbered(folder).items())[:-keep]:
        if epoch == 0 or epoch % 50:
            _remove(path)
