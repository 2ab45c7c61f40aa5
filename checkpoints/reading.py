"""From a file to a checkpoint, without running code that the file may hold.

Formats: .pth, .safetensors, and the folders of timm and Hugging Face (config.json and
model.safetensors), written by this project, the release, timm, mmpretrain, mmdet or mmseg; .h5 of
keras_cv_attention_models.
"""

import argparse
import errno
import json
import math
import pickle
import unicodedata
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from config.flags import FinetuneConfig
from models.layouts import from_keras
from models.pretrained import SAFE_GLOBALS, Inert, find_weights
from runtime.errors import UserError
from runtime.files import checksum_file, matches_checksum
from utils import are_names, numbered_classes

METADATA = "hornet"
"""Metadata key of .safetensors files for the rest of a checkpoint (args, classes), as JSON."""
FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", "model.safetensors"
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
"""Preprocessing in config.json, beside the image size."""
MULTI_LABEL = {"data_set": "multi_label", "problem_type": "multi_label_classification"}
"""Flag, and entry of config.json (that of transformers), of a model whose images have any number of
classes."""
DECODING = ("exif_orientation", "background")
"""Flags in config.json, if this project has written it."""


def read_checkpoint(
    path: str | Path, model: nn.Module | None = None, lazily: bool = False
) -> dict[str, Any]:
    """Read a checkpoint, a dict, on the CPU; a folder gives model, args and classes.

    `lazily` leaves most tensors in the file, and its checksum unread. Raises UserError if there is
    no such file, it is damaged, differs from its checksum, holds more than tensors and plain
    values, or is far too large for `model`, if given.
    """
    path = Path(path)
    if (path / FOLDER_CONFIG).is_file():
        weights = read_checkpoint(path / FOLDER_WEIGHTS, model, lazily)
        return {"model": weights, **_read_folder_config(path / FOLDER_CONFIG)}
    if not path.is_file():
        is_what = "is a folder; give a file of it" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {is_what}")
    try:
        _check_size(path, model)
        if not lazily and not matches_checksum(path):
            raise UserError(
                f"checkpoint {path} cannot be read: it differs from its checksum; if you changed "
                f"it, remove {checksum_file(path)}"
            )
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # refused pickles raise an error anyway
            if path.suffix == ".safetensors":
                state = _read_safetensors(path)
            elif path.suffix == ".h5":
                state = _read_keras(path)
            else:
                mmap = lazily and zipfile.is_zipfile(path)  # torch's oldest format is not
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except Exception as error:  # torch and zipfile raise many types for damaged files
        raise UserError(f"checkpoint {path} cannot be read: {_damage(path, error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} has no weights: it holds a {type(state).__name__}")
    return _without_inert(state)


def _without_inert(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict without what became Inert, also in dicts inside it."""
    kept = {name: value for name, value in state.items() if not isinstance(value, Inert)}
    inner = {n: _without_inert(v) for n, v in kept.items() if isinstance(v, dict)}
    # most files have none, and keep the type of their dicts
    changed = {name: value for name, value in inner.items() if value is not kept[name]}
    return state if len(kept) == len(state) and not changed else kept | changed


def damage_of(path: Path) -> str:
    """Return what is wrong with a checkpoint; '' if nothing is found."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        if checksum_file(path).is_file() and checksum_file(path).stat().st_size:
            return "" if matches_checksum(path) else "it differs from its checksum"
        read_checkpoint(path)  # without a checksum there is only trying
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
    """Return the weights in a checkpoint that was read from `path`.

    `keys` ('a|b') are tried in turn; with the default keys, bare state dicts, EMA-only files,
    detectors and segmentors are accepted, too. `prefix` is removed from the names; other names are
    ignored. Raises UserError if there are no weights.
    """
    weights = find_weights(checkpoint, keys.split("|") if keys != FinetuneConfig.model_key else [])
    if not _are_weights(weights):
        raise UserError(f"checkpoint {path} has no weights under --model_key {keys}")
    if prefix:
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not weights:
            raise UserError(f"checkpoint {path}: no name begins with --model_prefix {prefix}")
    return weights


def ema_weights_in(
    checkpoint: dict[str, Any], path: str | Path, name: str = "model_ema"
) -> dict[str, Tensor] | None:
    """Return the weights of an EMA in a checkpoint, by its key; None if there are none."""
    if name == "model_ema" and "state_dict_ema" in checkpoint:  # timm's key
        name = "state_dict_ema"
    weights = checkpoint.get(name)
    if not weights:
        return None
    if not isinstance(weights, dict) or not _are_weights(weights):
        raise UserError(f"checkpoint {path}: its {name} has no weights")
    return weights


def flags_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of the run that wrote a checkpoint, by this project, the release or timm."""
    flags = checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    if not isinstance(flags, dict):
        return {}
    if "img_size" in flags:  # timm's train.py, where None means the model's default
        size = flags.get("input_size") or flags["img_size"]
        size = size[-2:] if isinstance(size, list | tuple) else size
        given = flags | {"input_size": size}
        flags = {name: value for name, value in given.items() if value not in (None, "")}
    return {name: value for name, value in flags.items() if not torch.is_tensor(value)}


def is_multi_label(flags: dict[str, Any]) -> bool:
    """Return whether a model of a run with these flags gives an image any number of classes."""
    return any(flags.get(name) == value for name, value in MULTI_LABEL.items())


def classes_in(checkpoint: dict[str, Any], path: str | Path) -> list[str]:
    """Return the class names in a checkpoint, if it has any; UserError if they aren't strings."""
    classes = checkpoint.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"checkpoint {path}: its classes are not a list of names")
    named = are_names(classes, str(flags_in(checkpoint).get("data_set", "")))
    return [unicodedata.normalize("NFC", name) for name in classes] if named else []


def heads_of(source: Any) -> tuple[str, ...]:
    """Return the names of the classifier layers, usually one, of a timm model or pretrained_cfg."""
    cfg = getattr(source, "pretrained_cfg", source)
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    names = cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def rows_in(checkpoint: dict[str, Any], head: str) -> int:
    """Return the number of classes of the layer `head` in a checkpoint; 0 if that is not clear."""
    ends = f".{head}.bias"
    found = [v for name, v in find_weights(checkpoint).items() if f".{name}".endswith(ends)]
    return len(found[0]) if len(found) == 1 and torch.is_tensor(found[0]) else 0


def numbered_as_saved(classes: list[str], flags: dict[str, Any]) -> list[str]:
    """Return folders 0 to n - 1 in the order of a checkpoint that does not name its classes.

    They are sorted as numbers, but the release's image_folder sorted them as text.
    """
    numbers = numbered_classes(len(classes))
    is_text = flags.get("data_set") == "image_folder"
    return numbers if sorted(classes) == sorted(numbers) and not is_text else classes


def size_of(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
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
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return {"model": weights, **rest} if rest else weights


def _read_keras(path: Path) -> dict[str, Any]:
    """Read a file of keras_cv_attention_models: weights, or a whole model."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"checkpoint {path} needs h5py: pip install '.[keras]'") from None
    found: dict[str, Any] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    with h5py.File(path) as file:
        root = file.get("model_weights", file)
        root.visititems(lambda name, item: found.update({name: item}))
        sets = {name: item for name, item in found.items() if isinstance(item, h5py.Dataset)}
        if any(item.external or item.is_virtual for item in sets.values()):
            raise UserError(f"checkpoint {path} cannot be read: it refers to other files")
        size, unpacked = path.stat().st_size, sum(item.nbytes for item in sets.values())
        if unpacked > 10 * size:
            raise UserError(_unpacks(path, size, unpacked))
        for name, item in sets.items():
            layer, own = ["", *name.split("/")][-2:]
            weights.setdefault(layer, {})[own.partition(":")[0]] = torch.from_numpy(item[()])
    try:
        return {"model": from_keras(weights)}
    except ValueError as error:
        raise UserError(f"checkpoint {path} is of another model: {error}") from None


def _read_folder_config(path: Path) -> dict[str, Any]:
    """Return args (the flags) and, if they are named, classes."""
    try:
        facts = json.loads(path.read_text())
        cfg = facts["pretrained_cfg"]
        channels, height, width = cfg["input_size"]
        kwargs = facts.get("model_args", {})
        # timm records all arguments; these are left to the flags of the next run
        free = {"num_classes", "drop_path_rate", "head_init_scale", "in_chans"}
        if kwargs.get("layer_scale_init_value"):  # 0: the weights have none
            free.add("layer_scale_init_value")
        kwargs = {name: value for name, value in kwargs.items() if name not in free}
        flags = {
            "model": facts["architecture"],
            "model_kwargs": kwargs,
            "input_size": [height, width],
            "in_chans": channels,
        }
        flags |= {name: cfg[name] for name in PREPROCESSING}
        flags |= {n: facts[n] for n in (*DECODING, "value_range", "problem_type") if n in facts}
        names = facts.get("label_names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not timm's format: {type(error).__name__} {error}") from None
    return {"args": flags} | ({"classes": names} if names else {})


def _unpacks(path: Path, size: int, unpacked: int) -> str:
    return f"checkpoint {path} cannot be read: {size:,} bytes unpack to {unpacked:,}"


def _check_size(path: Path, model: nn.Module | None) -> None:
    """Refuse a file that would fill the memory when it is read."""
    size = unpacked = path.stat().st_size
    if zipfile.is_zipfile(path):  # safetensors and torch's oldest format are not
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 10 * size:
        raise UserError(_unpacks(path, size, unpacked))
    own = size_of(model.state_dict()) if model else math.inf
    # weights, EMA and two moments make four times the model's size; the rest is a margin
    if unpacked > 10 * own + 2**24:
        raise UserError(
            f"checkpoint {path} is of another model: it takes {unpacked:,} bytes, the model {own:,}"
        )


def _damage(path: Path, error: Exception) -> str:
    # torch raises EINVAL for a truncated zip file
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return str(error)
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "it is empty"
    if path.suffix != ".safetensors" and start not in (b"PK", b"\x80\x02"):
        return "it is not a PyTorch checkpoint"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors and plain values, which could run code"
    return f"it may be truncated ({(str(error).splitlines() or [type(error).__name__])[0]})"
