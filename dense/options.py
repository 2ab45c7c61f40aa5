"""Settings in configs and on the command line: each has to name something that a run reads."""

import ast
import difflib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

import models
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
    "train_pipeline": "train_dataloader.dataset.pipeline",
    "test_pipeline": "test_dataloader.dataset.pipeline, and that of val",
}
"""Names of mmdet 2, mmseg 0 and of variables in config files -> what a run reads."""
OWN = {"tta_model", "tta_pipeline", "custom_imports", "model_wrapper_cfg", "vis_backends"}
OWN |= {"find_unused_parameters", "sync_bn", "compile", "activation_checkpointing"}
OWN |= {"efficient_conv_bn_eval", "custom_hooks"}
FOR_BUILDERS = {"type", "_scope_", "_delete_", "constructor", "paramwise_cfg", "optimizer"}
FOR_BUILDERS |= {"convert_to_iter_based", "init_cfg", "priority", "by_epoch", "bg_cls_weight"}
"""Settings that registries, builders and heads take for themselves."""
REGISTRIES = [
    *("MODELS", "DATASETS", "TRANSFORMS", "METRICS", "HOOKS", "OPTIMIZERS", "VISUALIZERS"),
    *("OPTIM_WRAPPERS", "PARAM_SCHEDULERS", "LOOPS", "DATA_SAMPLERS", "TASK_UTILS"),
]
"""mmengine's, to look types up in."""
CUTOFF = 0.8
"""Least similarity, by difflib, of a name that may be meant."""


def check_files(path: Path) -> list[str]:
    """Raise UserError for a name at the top level of a config, or its bases, that nothing reads.

    Readers are mmengine's Runner, the file itself, and the files that have it as a base. Where no
    other name seems to be meant, a line that tells it is returned instead. Files that mmengine
    saved are left out: they hold the values of such names.
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
        none = {n for n, v in values.items() if isinstance(v, ast.Constant) and v.value is None}
        is_saved = "_base_" not in values and not read[file]
        names[file] = [n for n in values if not (n.startswith("_") or is_saved or n in none)]
        bases = ast.walk(values["_base_"]) if "_base_" in values else ()
        texts = [node.value for node in bases if isinstance(node, ast.Constant)]
        files += [file.parent / str(text) for text in texts]
    by_runs, lines = _read_by_runs(), []
    for file in names:
        for name in names[file]:
            if name not in by_runs | by_others | read[file]:
                hint = _hint(name, by_runs)
                lines.append(f"config {file}: nothing reads {name}{hint}")
                if hint:
                    raise UserError(lines[-1])
    return lines


def check_options(options: dict[str, Any]) -> None:
    """Raise UserError for a setting that nothing reads, with the name that it may stand for."""
    read = _read_by_runs()
    for name in options:
        if name.split(".")[0] not in read:
            raise UserError(f"--cfg-options {name}: nothing reads it{_hint(name, read)}")


def check_settings(config: Any) -> None:
    """Raise UserError for a setting that the class which it is for does not have.

    These are the data loaders, the loops, and every part of the config that names its type.
    """
    from mmengine import registry, runner

    from dense.backbone import HorNet

    scope = config.get("default_scope", "mmengine")
    registry.init_default_scope(scope)
    registries = [getattr(registry, name) for name in REGISTRIES]
    loader = _accepted(DataLoader) | {"num_batch_per_epoch"}
    for part in ("train", "val", "test"):
        _check_keys(f"{part}_dataloader", config.get(f"{part}_dataloader") or {}, loader)
    loops = {"val_cfg": runner.ValLoop, "test_cfg": runner.TestLoop, "train_cfg": None}
    for name, kind in loops.items():
        settings = config.get(name) or {}
        if name == "train_cfg":
            by_epoch = settings.get("by_epoch", "max_epochs" in settings)
            kind = runner.EpochBasedTrainLoop if by_epoch else runner.IterBasedTrainLoop
        if "type" not in settings:
            _check_keys(name, settings, _accepted(kind) | {"by_epoch"})
    read = {name: value for name, value in config.items() if name in _read_by_runs()}
    for name, settings in _parts(read, ""):
        kind = settings["type"]
        if isinstance(kind, str):
            kind = next(filter(None, (_found(kind, place, scope) for place in registries)), None)
        if isinstance(kind, type):
            accepted = _accepted(kind) | FOR_BUILDERS
            if kind is HorNet:  # passes them on to the network
                accepted = accepted - {"**"} | _accepted(models.HorNet)
            _check_keys(name, settings, accepted)


def _found(kind: str, registry: Any, scope: str) -> Any:
    with registry.switch_scope_and_registry(scope) as own:
        return own.get(kind)


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the dicts that name a type, with their places, but for layers, which have builders."""
    if name.endswith(("norm_cfg", "conv_cfg", "act_cfg", "upsample_cfg", ".dcn")):
        return
    if isinstance(value, dict) and "type" in value:
        yield name, value
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _parts(inner, f"{name}.{key}".lstrip("."))


def _accepted(kind: Any) -> set[str]:
    """Return the names of a class's arguments, with those that it may pass on to its bases.

    '**' is among them if they may be any.
    """
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        try:
            parameters = inspect.signature(base.__init__).parameters.values()
        except (TypeError, ValueError):
            return names | {"**"}
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
        names.add("**")
    return names - {"self"}


def _check_keys(name: str, settings: Any, accepted: set[str]) -> None:
    # where any name may be passed on, only those that look very much like another are refused
    cutoff = 0.85 if "**" in accepted else CUTOFF
    for key in (key for key in settings if key not in accepted):
        near = difflib.get_close_matches(str(key), accepted, n=1, cutoff=cutoff)
        if near or "**" not in accepted:
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
    if old_names := difflib.get_close_matches(name, OLD_NAMES, n=1, cutoff=0.9):
        return _hint(old_names[0], read)
    near = difflib.get_close_matches(name.split(".")[0], read, n=1, cutoff=CUTOFF)
    return f"; did you mean {'.'.join([near[0], *name.split('.')[1:]])}?" if near else ""
