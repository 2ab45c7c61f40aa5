"""What a checkpoint file holds, read without running code that it may hold.

Files are .pth, .safetensors, or folders in the form of timm and Hugging Face (config.json and
model.safetensors); written by this project, the release, timm, or mmdet and mmseg.
"""

import argparse
import json
import math
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from checkpoints.checksums import checksum_file, matches_checksum
from config import FinetuneConfig
from models.pretrained import RELEASED_FLAGS, find_weights
from runtime.errors import UserError

LARGEST_FACTOR = 10
"""How many times the size of the model a file may have: weights, EMA and two moments are four."""
SMALL = 2**24
"""Bytes that any file may have, of however small a model."""
METADATA = "hornet"
"""Key of the metadata of a .safetensors file for the rest of a checkpoint (args, classes), JSON."""
FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", "model.safetensors"
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
"""What a folder's config.json and flags have in common of the preprocessing, beside the size."""


def read_checkpoint(path: str | Path, model: nn.Module | None = None) -> dict[str, Any]:
    """The dict that a checkpoint file holds, on the CPU.

    A folder gives what a checkpoint of this project would hold: model, args and classes.

    Raises:
        UserError: there is no such file, it is damaged, differs from the checksum beside it, holds
            more than tensors and plain values, or is far too large for `model`, if given.
    """
    path = Path(path)
    if (path / FOLDER_CONFIG).is_file():
        weights = read_checkpoint(path / FOLDER_WEIGHTS, model)
        return {"model": weights, **_read_folder_config(path / FOLDER_CONFIG)}
    if not path.is_file():
        is_what = "is a folder; give a file of it" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {is_what}")
    try:
        _check_size(path, model)
        if not matches_checksum(path):
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


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is known to be."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        if checksum_file(path).is_file() and checksum_file(path).stat().st_size:
            return "" if matches_checksum(path) else "it differs from its checksum"
        read_checkpoint(path)  # without a checksum only trying tells
    except OSError as error:
        return str(error)
    except UserError as error:
        return str(error).partition("cannot be read: ")[2] or str(error)
    return ""


def weights_in(
    checkpoint: dict[str, Any],
    path: str | Path,
    keys: str = FinetuneConfig.model_key,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The weights in a checkpoint that was read from `path`.

    Args:
        checkpoint: What the file holds.
        path: The file, for messages.
        keys: Entries to look for them in, 'a|b'. With the default keys, also accepts bare state
            dicts, EMA-only files, detectors and segmentors.
        prefix: What the names begin with; it is cut off, and other names are left out.

    Raises:
        UserError: there are none.
    """
    named = keys.split("|") if keys != FinetuneConfig.model_key else []
    weights = find_weights(checkpoint, named)
    if not _are_weights(weights):
        raise UserError(f"checkpoint {path} has no weights under --model_key {keys}")
    if prefix:
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not weights:
            raise UserError(f"checkpoint {path}: no name begins with --model_prefix {prefix}")
    return weights


def ema_weights_in(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor] | None:
    """The weights of the EMA in a checkpoint; None if it has none."""
    name = "state_dict_ema" if "state_dict_ema" in checkpoint else "model_ema"  # the first: timm's
    weights = checkpoint.get(name)
    if not weights:
        return None
    if not isinstance(weights, dict) or not _are_weights(weights):
        raise UserError(f"checkpoint {path}: its {name} are no weights")
    return weights


def flags_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint: of this project, the release, or timm."""
    flags = checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    if not isinstance(flags, dict):
        return {}
    if "img_size" in flags:  # timm's train.py, where None is the model's own
        size = flags.get("input_size") or flags["img_size"]
        size = size[-1] if isinstance(size, list | tuple) else size
        given = flags | {"input_size": size}
        flags = {name: value for name, value in given.items() if value not in (None, "")}
    return {name: value for name, value in flags.items() if not torch.is_tensor(value)}


def classes_in(checkpoint: dict[str, Any], path: str | Path) -> list[str]:
    """The class names in a checkpoint, empty if it has none; UserError where they are no names."""
    classes = checkpoint.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"checkpoint {path}: its classes are no list of names")
    return classes


def size_of(value: Any) -> int:
    """Bytes of the tensors in a state dict, or any nesting of them."""
    if torch.is_tensor(value):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value
    return sum(map(size_of, inner)) if isinstance(value, dict | list | tuple) else 0


def _are_weights(value: dict[str, Any]) -> bool:
    return bool(value) and all(
        isinstance(name, str)
        and torch.is_tensor(tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not tensor.is_quantized
        for name, tensor in value.items()
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        rest = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return {"model": weights, **rest} if rest else weights


def _read_folder_config(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside weights: args (flags), and classes where they have names."""
    try:
        facts = json.loads(path.read_text())
        cfg = facts["pretrained_cfg"]
        channels, height, width = cfg["input_size"]
        if (channels, height) != (3, width):
            raise ValueError(f"images of {cfg['input_size']}")
        kwargs = {k: v for k, v in facts.get("model_args", {}).items() if k != "num_classes"}
        flags = {"model": facts["architecture"], "model_kwargs": kwargs, "input_size": height}
        flags |= {name: cfg[name] for name in PREPROCESSING}
        names = facts.get("label_names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is none of timm's: {type(error).__name__} {error}") from None
    return {"args": flags} | ({"classes": names} if names else {})


def _check_size(path: Path, model: nn.Module | None) -> None:
    """Refuses a file that would fill the memory before anything else is known of it."""
    size = unpacked = path.stat().st_size
    if zipfile.is_zipfile(path):  # safetensors and torch's oldest format are not
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except Exception as error:  # of half a dozen types for damaged files
            raise UserError(f"checkpoint {path} cannot be read: {_damage(path, error)}") from None
    if unpacked > LARGEST_FACTOR * size:
        raise UserError(f"checkpoint {path} cannot be read: {size:,} bytes unpack to {unpacked:,}")
    own = size_of(model.state_dict()) if model else math.inf
    if unpacked > LARGEST_FACTOR * own + SMALL:
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
