"""Settings of the command line (--cfg-options): each has to name something that a run reads."""

import difflib
import inspect
from typing import Any

from torch.utils.data import DataLoader

from runtime.errors import UserError

OLD_NAMES = {
    "optimizer": "optim_wrapper.optimizer",
    "optimizer_config.grad_clip": "optim_wrapper.clip_grad",
    "lr_config": "param_scheduler",
    "lr": "optim_wrapper.optimizer.lr",
    "data.samples_per_gpu": "train_dataloader.batch_size",
    "data.workers_per_gpu": "train_dataloader.num_workers",
    "data.train": "train_dataloader.dataset",
    "data.val": "val_dataloader.dataset",
    "data.test": "test_dataloader.dataset",
    "batch_size": "train_dataloader.batch_size",
    "num_workers": "train_dataloader.num_workers",
    "data_root": "train_dataloader.dataset.data_root, and that of val and test",
    "classes": "train_dataloader.dataset.metainfo.classes, that of val and test, and the heads' "
    "num_classes",
    "num_classes": "the heads' num_classes",
    "runner.max_epochs": "train_cfg.max_epochs",
    "runner.max_iters": "train_cfg.max_iters",
    "total_epochs": "train_cfg.max_epochs",
    "max_epochs": "train_cfg.max_epochs, and param_scheduler's end and T_max",
    "max_iters": "train_cfg.max_iters, and param_scheduler's end",
    "evaluation.interval": "train_cfg.val_interval",
    "evaluation.save_best": "default_hooks.checkpoint.save_best",
    "checkpoint_config": "default_hooks.checkpoint",
    "log_config.interval": "default_hooks.logger.interval",
    "dist_params.backend": "env_cfg.dist_cfg.backend",
    "seed": "randomness.seed",
    "resume_from": "--resume",
}
"""Names of mmdet 2, mmseg 0 and of variables in config files -> what a run reads."""
OWN = {"tta_model", "tta_pipeline", "custom_imports", "model_wrapper_cfg", "vis_backends"}


def check_options(config: Any, options: dict[str, Any]) -> None:
    """Raise UserError for a setting that nothing reads, with the name that it may stand for."""
    from mmengine.runner import Runner

    read = {*inspect.signature(Runner.__init__).parameters, *OWN} - {"self", "cfg"}
    for name in options:
        first, *rest = name.split(".")
        if first not in read:
            raise UserError(f"--cfg-options {name}: nothing reads it{_hint(name, read)}")
        if rest:
            _check_near(config, name)


def _hint(name: str, read: set[str]) -> str:
    for old, new in OLD_NAMES.items():
        if name == old or name.startswith(f"{old}."):
            inner = name[len(old) :] if "," not in new and not new.startswith("the ") else ""
            return f"; set {new}{inner}"
    near = difflib.get_close_matches(name.split(".")[0], read, n=1)
    return f"; did you mean {'.'.join([near[0], *name.split('.')[1:]])}?" if near else ""


def _check_near(config: Any, name: str) -> None:
    """Refuse a new key that looks like one beside it."""
    *parents, key = name.split(".")
    place: Any = config
    for parent in parents:
        index: Any = int(parent) if isinstance(place, list | tuple) else parent
        try:
            place = place[index]
        except (KeyError, IndexError, TypeError, ValueError):
            return  # a new part: its class checks the keys
    if not isinstance(place, dict) or key in place:
        return
    known = {*place.keys()}
    if len(parents) == 1 and parents[0].endswith("_dataloader"):
        known |= {*inspect.signature(DataLoader.__init__).parameters}
        if key in known:
            return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
    if near:
        raise UserError(f"--cfg-options {name}: did you mean {'.'.join([*parents, near[0]])}?")
