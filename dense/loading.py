"""Checkpoints for mmengine: read without running code in them, refused if they don't fit.

mmengine's own readers fall back to unpickling anything, find no file name in URLs such as the
release's, and silently load only what fits.
"""

import copy
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner
from torch import nn

from checkpoints import fitting, reading
from checkpoints.sources import local_file
from dense.classes import all_classes
from dense.configs import dicts
from runtime.distributed import DistributedContext
from runtime.errors import UserError, some


def fetched(source: str) -> Path:
    """Return a path, URL or published name as a file; one process per machine downloads it."""
    ranks = get_rank(), int(os.environ.get("LOCAL_RANK", 0)), get_world_size()
    return local_file(source, DistributedContext(*ranks, torch.device("cpu")))


def read(filename: str, map_location: Any = None, **_: Any) -> dict[str, Any]:
    """Read a checkpoint of this project or the release on the CPU; UserError if that fails.

    Its config is left out: mmengine would run it when resuming.
    """
    state = reading.read_checkpoint(fetched(filename))
    if isinstance(state.get("meta"), dict):
        state["meta"].pop("config", None)
    if isinstance(state.get("message_hub"), dict):
        state["message_hub"] = _plain_hub(state["message_hub"])
    return state


def _plain_hub(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a MessageHub with plain values only, without the history of the losses.

    That only smooths the first log lines after resuming.
    """
    values = state["runtime_info"]
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    keys = {k: v for k, v in state["resumed_keys"].items() if k in values}
    return {"log_scalars": {}, "runtime_info": plain, "resumed_keys": keys}


def use_safe_readers() -> None:
    """Make mmengine read all checkpoints by `read`, whatever their address."""
    CheckpointLoader.register_scheme(list(CheckpointLoader._schemes), read, force=True)


class PlainCheckpoints(Hook):
    """Saves only tensors and plain values, which can be read safely."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["message_hub"] = _plain_hub(checkpoint["message_hub"])


class OwnFolder(Hook):
    """After a work folder was copied or moved, goes on with its own best checkpoint.

    Checkpoints hold the absolute path of the best one, which mmengine removes for a better one.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        values = (checkpoint.get("message_hub") or {}).get("runtime_info") or {}
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        out = next((hook.out_dir for hook in hooks if hook.out_dir), None)
        # as CheckpointHook will join them, before the training
        name = Path(runner.work_dir).name
        folder = Path(runner.work_dir) if out in (None, runner.work_dir) else Path(out, name)
        for key in [key for key in values if key.startswith(("best_ckpt", "last_ckpt"))]:
            own = folder / Path(str(values[key])).name
            if own.is_file():
                values[key] = str(own.resolve())
            else:
                del values[key]


class ConfigSchedules(Hook):
    """After resuming, rates and schedules are those of the config, from its first iteration on.

    mmengine would go on with those of the checkpoint, which a longer training runs past. Schedules
    that follow a metric go on as they were, with the rates of the checkpoint.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if not follows_metric(runner.cfg):
            checkpoint.pop("param_schedulers", None)

    def before_train(self, runner: Runner) -> None:
        if runner._resume and runner.iter >= runner.max_iters:
            print_log(f"nothing to train: {runner.iter} of {runner.max_iters} iterations are done",
                      "current", logging.WARNING)  # fmt: skip
        if not runner._resume or follows_metric(runner.cfg):
            return
        fresh = runner.build_optim_wrapper(copy.deepcopy(runner.cfg.optim_wrapper))
        runner.scale_lr(fresh, runner.auto_scale_lr)
        groups = runner.optim_wrapper.param_groups
        for group, new in zip(groups, fresh.param_groups, strict=True):
            for name in [name for name in group if name.startswith("initial_")]:
                del group[name]
            group |= {name: value for name, value in new.items() if name != "params"}
        if not runner.param_schedulers:
            return
        runner.param_schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
        per_epoch = len(runner.train_dataloader)
        counts_epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has made its steps before
            for iteration in range(1, runner.iter + 1):
                for scheduler in runner.param_schedulers:
                    if not scheduler.by_epoch or counts_epochs and iteration % per_epoch == 0:
                        scheduler.step()


def follows_metric(config: Any) -> bool:
    """Return whether a schedule of a config waits for the results of validations."""
    schedules = dicts(config.get("param_scheduler"))
    return any("OnPlateau" in str(schedule.get("type")) for schedule in schedules)


class CheckFit(Hook):
    """Refuses a checkpoint that does not fit the model; mmengine would load what fits.

    Everything has to fit for testing and resuming, the backbone for starting from weights.
    """

    def __init__(self, is_test: bool) -> None:
        self.is_test = is_test

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        path, is_resume = runner.cfg.load_from, runner.cfg.get("resume", False)
        check_fit(runner.model, checkpoint, path, whole=self.is_test or is_resume)
        if self.is_test or is_resume:
            part = "test" if self.is_test else "train"
            data = runner.cfg.get(f"{part}_dataloader", {}).get("dataset")
            for classes in all_classes(data, runner.cfg.default_scope):
                check_names(checkpoint, classes, path)
        if is_resume and "message_hub" not in checkpoint:
            raise UserError(
                f"checkpoint {path} has no training state that mmengine could resume: "
                "start from its weights by --load-from"
            )


def check_names(state: dict[str, Any], classes: Sequence[str], path: str) -> None:
    """Raise UserError if a checkpoint has the classes in another order; warn of other names."""
    known = ((state.get("meta") or {}).get("dataset_meta") or {}).get("classes") or classes
    if not isinstance(known, list | tuple) or list(known) == list(classes):
        return
    if sorted(map(str, known)) == sorted(classes):
        raise UserError(
            f"checkpoint {path} has the classes in another order: write classes = {tuple(known)}"
        )
    print_log(
        f"checkpoint {path} was trained on the classes {some(map(str, known))}, and is used for "
        f"{some(classes)}", "current", logging.WARNING,
    )  # fmt: skip


def weights_of(model: nn.Module, state: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the weights in a checkpoint; UserError if they are not of a model with a backbone."""
    found = {k.removeprefix("module."): v for k, v in reading.weights_in(state, path).items()}
    if hasattr(model, "backbone") and not any(name.startswith("backbone.") for name in found):
        raise UserError(
            f"checkpoint {path} is not of a detector or segmentor: it has no backbone.*; to train "
            "from a classifier's weights, give --cfg-options model.pretrained=PATH"
        )
    return found


def check_fit(model: nn.Module, state: dict[str, Any], path: str, whole: bool) -> None:
    """Raise UserError if the weights in `state` don't fit the `whole` model, or its backbone."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner  # wrappers for DDP and for test-time augmentation
    prefix = "" if whole else "backbone."
    found = weights_of(model, state, path)
    weights = {k: v for k, v in found.items() if k.startswith(prefix)}
    expected = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    fitting.check_fit(expected, weights, path)
