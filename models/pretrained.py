"""Published and older weights -> the state dict of this code: fetched, read, and fitted."""

import argparse
import hashlib
import http.client
import json
import logging
import os
import pickle
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PosixPath
from typing import Any
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from .spectral import resize_filter

logger = logging.getLogger(__name__)

# what flags in released files are made of; Python has moved the class of paths
RELEASED_FLAGS: list[Any] = [
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
]
WEIGHT_KEYS = ("model", "module", "state_dict", "model_ema")
"""Entries of checkpoints under which their weights may be, the likeliest first."""
# of DistributedDataParallel, torch.compile, and the backbone of a detector or segmentor
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """State dict for `model` out of a checkpoint: unwrapped, unprefixed, filters resized.

    Args:
        checkpoint: A state dict, or a dict that holds one under one of WEIGHT_KEYS.
        model: The model to load; global filters (C, h, w, 2) take the sizes of its own.
    """
    state_dict = find_weights(checkpoint)
    expected = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        name = _strip(key, expected)
        if name.endswith("complex_weight") and name in expected:
            height, width = expected[name].shape[1:3]
            if value.shape[1:3] != (height, width):
                value = resize_filter(value.float(), height, width).contiguous().to(value.dtype)
        out[name] = value
    return out


def find_weights(checkpoint: dict[str, Any], keys: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state dict in a checkpoint: the first of `keys` that holds one, {} if none does.

    Without keys these are WEIGHT_KEYS, or the checkpoint is a state dict itself.
    """
    found = [
        checkpoint[key] for key in keys or WEIGHT_KEYS if isinstance(checkpoint.get(key), dict)
    ]
    if found:
        return found[0]
    return {} if keys else checkpoint


def _strip(key: str, expected: dict[str, Tensor]) -> str:
    """Drops known prefixes, in any order, that the model's own names do not have."""
    while key not in expected and key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def download(address: str, file_name: str = "") -> Path:
    """The file behind an address: from torch.hub's cache, where it is put on first use.

    Args:
        address: Where the file is. The released ones end in '/?dl=1' and name no file.
        file_name: Its name in the cache; made from the address if not given.

    Raises:
        RuntimeError: it can't be had. The message says how to get it by hand.
    """
    name = file_name or _cache_name(address)
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    logger.info("downloading %s to %s", address, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = Request(address, headers={"User-Agent": "hornet-pytorch"})
        with urlopen(request, timeout=60) as response, temporary.open("wb") as file:
            shutil.copyfileobj(response, file)
            length = response.headers.get("Content-Length")
        if length and temporary.stat().st_size != int(length):
            raise OSError("the connection ended early")
        with temporary.open("rb") as file:
            if file.read(1) in (b"<", b""):  # a share that has expired says so in HTML
                raise OSError("it gave a web page, not weights")
        temporary.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeError(
            f"{address} could not be downloaded ({error}): open it in a browser and save the file "
            f"as {path}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _cache_name(address: str) -> str:
    """Two addresses never share a name, whatever their last part is."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    last = Path(urlparse(address).path).name
    known = last.endswith((".pth", ".pt", ".bin", ".safetensors"))
    return f"{digest}-{last}" if known else f"{digest}.pth"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a released .pth file, unprefixed, without running code that it may hold.

    Raises:
        RuntimeError: the file can't be read.
    """
    try:
        with torch.serialization.safe_globals(RELEASED_FLAGS):
            weights = find_weights(torch.load(path, map_location="cpu", weights_only=True))
            return {_strip(name, {}): value for name, value in weights.items()}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise RuntimeError(f"{path} can't be read ({reason}): remove it and try again") from None


@cache
def imagenet1k_in_22k() -> list[int]:
    """For each class of ImageNet-1K its row in the head of the released ImageNet-22K models."""
    return json.loads((Path(__file__).parent / "imagenet1k_in_22k.json").read_text())


def is_imagenet22k(rows: int) -> bool:
    """Whether a head of that many rows is one of the released ImageNet-22K models.

    The recorded index needs 10,459 rows; more than 10,560 would exceed the published size of
    hornet_large_gf_img384, 216 million parameters.
    """
    return max(imagenet1k_in_22k()) < rows <= 10_560


def select_imagenet1k(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an ImageNet-22K model with the head's rows of ImageNet-1K alone."""
    index = torch.tensor(imagenet1k_in_22k())
    heads = {"head.weight", "head.bias"} & state_dict.keys()
    return state_dict | {name: state_dict[name][index] for name in heads}
