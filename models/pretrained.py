"""Published weights: download, reading, and conversion to a model's state dict."""

import argparse
import hashlib
import http.client
import json
import logging
import pickle
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor, nn

from .layouts import from_mmpretrain
from .spectral import resize_filter

logger = logging.getLogger(__name__)


class Inert:
    """What an object of mmengine in a checkpoint becomes: it holds nothing and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# types of the flags in released files, and of P2P's best accuracy; Python has moved the class of
# paths, NumPy its scalars
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")},
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
    # the history of losses in files of mmengine's Runner
    (Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (Inert, "builtins.getattr"),
    (Inert, "numpy.ndarray"),
    *((Inert, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
WEIGHT_KEYS = ("model", "module", "model_ema", "state_dict")
"""Keys of checkpoints that may hold the weights; the first that is there does."""
# of DistributedDataParallel, torch.compile, and detectors and segmentors
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict for `model` from a checkpoint.

    The checkpoint is a state dict, or holds one under one of WEIGHT_KEYS. Prefixes are removed, and
    global filters (C, h, w, 2) are resized to those of the model.
    """
    expected = model.state_dict()
    out = {}
    for key, value in find_weights(checkpoint).items():
        name = _strip(key, expected)
        if name.endswith("complex_weight") and name in expected:
            height, width = expected[name].shape[1:3]
            if value.shape[1:3] != (height, width):
                value = resize_filter(value.float(), height, width).contiguous().to(value.dtype)
        out[name] = value
    return out


def find_weights(checkpoint: dict[str, Any], keys: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return what is under the first of `keys` that is there; {} if none is, or if it is no dict.

    Those of mmpretrain's HorNet get the release's names. Without `keys`, WEIGHT_KEYS are tried,
    then the checkpoint itself is the state dict.
    """
    for key in keys or WEIGHT_KEYS:
        if key in checkpoint:
            return from_mmpretrain(checkpoint[key]) if isinstance(checkpoint[key], dict) else {}
    return {} if keys else from_mmpretrain(checkpoint)


def _strip(key: str, expected: dict[str, Tensor]) -> str:
    """Remove known prefixes that the model's own names don't have."""
    while key not in expected and key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def cache_file(name: str) -> Path:
    """Return the path of a download in torch.hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def download(address: str, file_name: str = "", digest: str = "") -> Path:
    """Download a file into torch.hub's cache, if it isn't there undamaged, and return its path.

    `file_name` is its name in the cache, by default derived from the URL: those of the release end
    in '/?dl=1'. Its SHA-256, which has to begin with `digest`, is kept beside it. Several machines
    may share the cache. Raises RuntimeError if the download fails, which says how to do it by hand.
    """
    name = file_name or _cache_name(address)
    path = cache_file(name)
    checksum = path.with_name(f"{name}.sha256")
    if path.exists():
        if not checksum.exists() or checksum.read_text().split()[:1] == [_sha256(path)]:
            return path
        logger.warning("%s differs from its checksum: it is downloaded again", path)
    logger.info("downloading %s to %s", address, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # two machines may have processes of the same id
        with TemporaryDirectory(dir=path.parent, prefix=f".{name}.", suffix=".tmp") as folder:
            temporary = Path(folder) / name
            request = Request(address, headers={"User-Agent": "hornet-pytorch"})
            with urlopen(request, timeout=60) as response, temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
                length = response.headers.get("Content-Length")
            if length and temporary.stat().st_size != int(length):
                raise OSError("the connection ended early")
            with temporary.open("rb") as file:
                if file.read(1) in (b"<", b""):  # an expired share returns HTML
                    raise OSError("it returned a web page, not weights")
            found = _sha256(temporary)
            if not found.startswith(digest):
                raise OSError(f"its SHA-256 {found} does not begin with {digest}")
            line = Path(folder) / checksum.name
            line.write_text(f"{found}  {name}\n")
            temporary.replace(path)
            line.replace(checksum)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeError(
            f"{address} could not be downloaded ({error}): open it in a browser and save the file "
            f"as {path}"
        ) from None
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _cache_name(address: str) -> str:
    """Return a name that differs for each URL, even if their last parts are equal."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    last = Path(urlparse(address).path).name
    known = last.endswith((".pth", ".pt", ".bin", ".safetensors"))
    return f"{digest}-{last}" if known else f"{digest}.pth"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights in a .pth file, without prefixes and without running code in the file.

    Raises RuntimeError if the file can't be read.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            weights = find_weights(torch.load(path, map_location="cpu", weights_only=True))
            return {_strip(name, {}): value for name, value in weights.items()}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise RuntimeError(f"{path} can't be read ({reason}): remove it and try again") from None


@cache
def imagenet1k_in_22k() -> list[int]:
    """Return the row of each ImageNet-1K class in the head of the ImageNet-22K models."""
    return json.loads((Path(__file__).parent / "imagenet1k_in_22k.json").read_text())


def is_imagenet22k(rows: int) -> bool:
    """Return whether a head has as many rows as the released ImageNet-22K models.

    The index of the 1K classes needs 10,459 rows; more than 10,560 would exceed the published size
    of hornet_large_gf_img384, 216 million parameters.
    """
    return max(imagenet1k_in_22k()) < rows <= 10_560


def select_imagenet1k(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reduce the head in an ImageNet-22K state dict to the rows of ImageNet-1K."""
    index = torch.tensor(imagenet1k_in_22k())
    heads = {"head.weight", "head.bias"} & state_dict.keys()
    return state_dict | {name: state_dict[name][index] for name in heads}
