"""Checkpoints for mmengine: read without running their code, and refused where they do not fit.

mmengine's own readers fall back to unpickling whatever is there, find no file name in addresses
such as the release's, and load what happens to fit without an error.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from checkpoints.fitting import check_fit as check_names_and_shapes
from checkpoints.reading import read_checkpoint, weights_in
from checkpoints.sources import local_file
from runtime.distributed import DistributedContext
from runtime.errors import UserError


def fetched(source: str) -> Path:
    """The file of a path, an address, or a published name; one process of a machine downloads."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    return local_file(source, DistributedContext(get_rank(), local_rank, get_world_size(), device))


def read(filename: str, map_location: Any = None, **_: Any) -> dict[str, Any]:
    """A checkpoint of ours or of the release, on the CPU; raises UserError where there is none.

    Its config, which mmengine would run on a resume, is left out.
    """
    with torch.serialization.safe_globals(_NUMBERS):
        state = read_checkpoint(fetched(filename))
    if isinstance(state.get("meta"), dict):
        state["meta"].pop("config", None)
    return state


# best scores and the like, in checkpoints of the release's mmcv
_NUMBERS: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")},
    # numpy.core until numpy 2
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
]


def use_safe_readers() -> None:
    """From here on mmengine reads by `read` whatever a checkpoint is named by."""
    schemes = list(CheckpointLoader._schemes)
    CheckpointLoader.register_scheme(prefixes=schemes, loader=read, force=True)


class PlainCheckpoints(Hook):
    """Saves tensors and plain values only, so that they can be read safely.

    What is left out, the history of the losses, only smooths the log's next lines.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["message_hub"]
        values = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in state["runtime_info"].items()
        }
        keys = {name: kept for name, kept in state["resumed_keys"].items() if name in values}
        checkpoint["message_hub"] = {
            "log_scalars": {},
            "runtime_info": values,
            "resumed_keys": keys,
        }


class CheckFit(Hook):
    """Refuses a checkpoint that does not fit the model, which mmengine would load in part.

    To test and to resume, everything has to fit; to start from, the backbone.

    Args:
        path: The checkpoint, for messages.
        is_test: Whether the model is tested with it.
        is_resume: Whether a training goes on from it.
    """

    def __init__(self, path: str, is_test: bool, is_resume: bool) -> None:
        self.path = path
        self.is_test = is_test
        self.is_resume = is_resume

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        check_fit(runner.model, checkpoint, self.path, whole=self.is_test or self.is_resume)
        if self.is_resume and "message_hub" not in checkpoint:
            raise UserError(
                f"checkpoint {self.path} has no state of a training that mmengine could resume: "
                "start from its weights by --load-from"
            )


def check_fit(model: nn.Module, state: dict[str, Any], path: str, whole: bool) -> None:
    """Raises UserError where the weights in `state` do not fit `model`, or its backbone."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner  # of DistributedDataParallel, or of testing at several sizes
    weights: dict[str, Tensor] = {
        name.removeprefix("module."): value for name, value in weights_in(state, path).items()
    }
    expected = model.state_dict()
    if not whole:
        if not any(name.startswith("backbone.") for name in weights):
            raise UserError(
                f"checkpoint {path} is no detector's or segmentor's: start from a classifier's "
                "weights by --cfg-options model.pretrained=PATH"
            )
        weights = {k: v for k, v in weights.items() if k.startswith("backbone.")}
        expected = {k: v for k, v in expected.items() if k.startswith("backbone.")}
    check_names_and_shapes(expected, weights, path)
