"""Settings in configs and on the command line: each has to name something that a run reads."""

import ast
import difflib
import inspect
import re
from pathlib import Path
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


def check_files(path: Path) -> None:
    """Raise UserError for a name at the top level of a config, or its bases, that nothing reads.

    That is neither mmengine's Runner, nor the file itself, nor one that has it as a base. Files
    that mmengine saved are left out: they hold the values of such names.
    """
    names: dict[Path, list[str]] = {}
    read: dict[Path, set[str]] = {}
    by_others = set()
    files = [path]
    while files:
        file = files.pop()
        if file in names or file.suffix != ".py" or not file.is_file():  # a base in a package
            continue
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        by_others |= {*re.findall(r"_base_\.(\w+)", text)}
        loads = [
            n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        ]
        read[file] = {load.id for load in loads} - {"dict"}
        assigned = [s for s in tree.body if isinstance(s, ast.Assign)]
        values = {getattr(s.targets[0], "id", "_"): s.value for s in assigned}
        is_saved = "_base_" not in values and not read[file]
        names[file] = [name for name in values if not name.startswith("_") and not is_saved]
        bases = ast.walk(values["_base_"]) if "_base_" in values else ()
        texts = [node.value for node in bases if isinstance(node, ast.Constant)]
        files += [file.parent / str(text) for text in texts]
    by_runs = _read_by_runs()
    for file in names:
        for name in names[file]:
            if name not in by_runs | by_others | read[file]:
                raise UserError(f"config {file}: nothing reads {name}{_hint(name, by_runs)}")


def check_options(config: Any, options: dict[str, Any]) -> None:
    """Raise UserError for a setting that nothing reads, with the name that it may stand for."""
    read = _read_by_runs()
    for name in options:
        first, *rest = name.split(".")
        if first not in read:
            raise UserError(f"--cfg-options {name}: nothing reads it{_hint(name, read)}")
        if rest:
            _check_near(config, name)


def check_loaders(config: Any) -> None:
    """Raise UserError for a key of a data loader that it does not have."""
    known = {*inspect.signature(DataLoader.__init__).parameters, "num_batch_per_epoch"} - {"self"}
    for name in (f"{part}_dataloader" for part in ("train", "val", "test")):
        for key in config.get(name) or ():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"nothing reads {name}.{key}{hint}")


def _read_by_runs() -> set[str]:
    from mmengine.runner import Runner

    return {*inspect.signature(Runner.__init__).parameters, *OWN} - {"self", "cfg"}


def _hint(name: str, read: set[str]) -> str:
    for old, new in OLD_NAMES.items():
        if name == old or name.startswith(f"{old}."):
            inner = name[len(old) :] if "," not in new and not new.startswith("the ") else ""
            return f"; set {new}{inner}"
    parts = [f"{old} is {new}" for old, new in OLD_NAMES.items() if old.startswith(f"{name}.")]
    if parts:
        return f"; today {', '.join(parts)}"
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
    if len(parents) == 1 and parents[0].endswith("_dataloader"):
        return  # check_loaders knows all their keys
    near = difflib.get_close_matches(key, place, n=1, cutoff=0.85)
    if near:
        raise UserError(f"--cfg-options {name}: did you mean {'.'.join([*parents, near[0]])}?")
