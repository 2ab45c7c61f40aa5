"""Training and testing of detectors and segmentors by mmengine's Runner.

`python -m object_detection.train CONFIG ...` and its three siblings call `main`. The flags are
those of the tools of mmdet 3 and mmseg 1; the names in the released commands work, too.
"""

import argparse
import copy
import logging
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from dense.configs import dicts, formatted_once, read_config
from dense.options import check_files, check_options, check_settings
from dense.smoke import shrink
from dense.tta import use_several_views
from models import accelerate
from runtime.distributed import close_distributed, init_distributed
from runtime.errors import UserError, one_line


def main(task: str, action: str, argv: list[str] | None = None) -> int:
    """Train or test, as `action` says; return the exit status.

    `task` is 'object_detection' or 'semantic_segmentation'; `argv` is sys.argv[1:] by default.
    """
    program = f"{task}.{action}"
    try:
        need_stack()
        try:
            arguments = parser(program, action).parse_args(argv)
        except ValueError:
            raise UserError("--cfg-options: give settings as NAME=VALUE") from None
        config = load_config(arguments, task)
        with formatted_once():
            (_train if action == "train" else _test)(config, arguments)
    except (UserError, OSError) as error:
        sys.stderr.write(f"{program}: error: {one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; --resume continues after the last checkpoint\n")
        return 1
    close_distributed()
    return 0


def need_stack() -> None:
    """Raise UserError if the mm stack is not installed."""
    try:
        import mmdet  # noqa: F401
        import mmseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: run `make dense` once") from None


def parser(program: str, action: str) -> argparse.ArgumentParser:
    from mmengine.config import DictAction

    this = argparse.ArgumentParser(f"python -m {program}")
    add = this.add_argument
    add("config", help="a file in configs/")
    if action == "test":
        add("checkpoint", help="weights of the whole model: a path or URL")
    add("--work-dir", help="folder for logs and checkpoints (work_dirs/CONFIG)")
    add("--cfg-options", "--options", nargs="+", action=DictAction, help="settings: a.b=value ...")
    add("--launcher", choices=["none", "pytorch", "slurm"], default="none")
    add("--local_rank", "--local-rank", type=int, default=0, help="set by launchers")
    if action == "train":
        add("--amp", action="store_true", help="mixed precision, on a GPU")
        add("--auto-scale-lr", action="store_true", help="scale the rate to the batch size")
        add("--resume", nargs="?", const="auto", help="a checkpoint, or the newest in the work-dir")
        add("--resume-from", dest="resume", help="older name of --resume")
        add("--load-from", help="start weights of a whole model")
        add("--no-validate", action="store_true", help="train without validation")
        add("--smoke", action="store_true", help="two steps of a small network on drawn data")
    else:
        add("--out", help="for predictions: a .pkl file (detection) or a folder (segmentation)")
        add("--show-dir", help="folder for pictures of the predictions")
        add("--tta", "--aug-test", action="store_true", help="test-time augmentation")
        add("--eval", nargs="+", help="accepted, but the metrics are those of the config")
    return this


def load_config(arguments: argparse.Namespace, task: str) -> Any:
    """Return the config with the command line's settings; model.pretrained is the backbone's."""
    config = read_config(arguments.config, task)
    for line in check_files(Path(config.filename)):
        sys.stderr.write(f"{line}\n")
    renamed = {"model.pretrained": "model.backbone.pretrained"}
    given = arguments.cfg_options or {}
    options = {renamed.get(name, name): value for name, value in given.items()}
    check_options(options)
    config.merge_from_dict(options)
    if (config.default_scope == "mmdet") != (task == "object_detection"):
        raise UserError(f"config {arguments.config} is not of {task}")
    check_settings(config)
    config.launcher = arguments.launcher
    default = f"work_dirs/{Path(arguments.config).stem}"
    config.work_dir = arguments.work_dir or config.get("work_dir") or default
    return config


def _train(config: Any, arguments: argparse.Namespace) -> None:
    if arguments.smoke:
        shrink(config)
    if arguments.amp:
        if not torch.cuda.is_available():
            raise UserError("--amp needs a GPU")
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if arguments.auto_scale_lr:
        if "auto_scale_lr" not in config:
            raise UserError("--auto-scale-lr: the config has no base_batch_size")
        config.auto_scale_lr.enable = True
    if arguments.no_validate:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
    _choose_checkpoint(config, arguments)
    runner = _runner(config, arguments, "train", "val")
    _check_data(runner, "train")
    iterations = runner.train_loop.max_iters
    schedules = leave_out_short(runner)
    for step in schedules if isinstance(schedules, list) else ():
        is_warm_up = step.type == "LinearLR" and not step.get("by_epoch", True)
        if is_warm_up and step.get("end", 0) > iterations:
            raise UserError(
                f"the warm-up of {step.end} iterations is longer than the training of "
                f"{iterations}: lower its end in the config's param_scheduler"
            )
    if config.get("val_cfg") is not None:
        _check_data(runner, "val")
    runner.train()


def leave_out_short(runner: Any) -> Any:
    """Return the schedules of a runner, without warm-ups of one iteration.

    The rate would stay at their first factor for good: its last step is never made.
    """
    from mmengine.logging import print_log

    given = runner.param_schedulers
    if not isinstance(given, list):
        return given
    per_epoch = len(runner.train_loop.dataloader)

    def iterations(step: Any) -> float:
        length = step.get("end", math.inf) - step.get("begin", 0)
        to_convert = step.get("by_epoch", True) and step.get("convert_to_iter_based")
        return length * per_epoch if to_convert else length

    short = [step for step in given if step.type == "LinearLR" and iterations(step) < 2]
    if short:
        print_log("a warm-up of one step is left out", "current", logging.WARNING)
        runner.param_schedulers = [step for step in given if step not in short]
        runner.cfg.param_scheduler = runner.param_schedulers
    return runner.param_schedulers


def _choose_checkpoint(config: Any, arguments: argparse.Namespace) -> None:
    """Set the config's load_from and resume."""
    source = arguments.load_from or config.get("load_from")
    found = arguments.resume or ("auto" if config.get("resume") and not source else None)
    if found == "auto" and not (found := newest_checkpoint(Path(config.work_dir))):
        sys.stderr.write(f"--resume: no checkpoint in {config.work_dir}, starting from scratch\n")
    config.resume = found is not None
    config.load_from = found or source
    if config.resume:
        config.model.backbone.pretrained = None  # unneeded, and perhaps gone by now


def newest_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint in a work-dir, even if the folder was moved."""
    note = folder / "last_checkpoint"  # written after each checkpoint
    if note.is_file() and (found := folder / Path(note.read_text().strip()).name).is_file():
        return str(found)
    files = [p for p in folder.glob("*.pth") if re.fullmatch(r"(epoch|iter)_\d+", p.stem)]
    return str(max(files, key=lambda path: path.stat().st_mtime)) if files else None


def _test(config: Any, arguments: argparse.Namespace) -> None:
    from mmdet.evaluation import DumpDetResults

    from dense import outputs

    is_detector = config.default_scope == "mmdet"
    config.load_from = arguments.checkpoint
    if arguments.show_dir:
        processes = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
        if arguments.launcher != "none" and processes > 1:
            raise UserError("--show-dir: only the first process draws; test in one process")
        if is_detector:
            load_truth_last(config.test_dataloader.dataset)
        folder = str(Path(arguments.show_dir).resolve())
        config.default_hooks.visualization.draw = True
        if is_detector:
            config.default_hooks.visualization.update(type="PicturesByPath", test_out_dir=folder)
        else:
            config.visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": folder}]
    if arguments.tta:
        use_several_views(config)
    if arguments.out and is_detector and not arguments.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out {arguments.out}: give a name that ends in .pkl")
    runner = _runner(config, arguments, "test")
    _check_data(runner, "test")
    if arguments.show_dir:
        outputs.number_names(runner.visualizer, Path(arguments.show_dir))
    if arguments.out and is_detector:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=arguments.out))
    elif arguments.out:
        dataset = runner.test_loop.dataloader.dataset
        runner.test_evaluator.metrics.append(outputs.SaveMasks(arguments.out, dataset))
    runner.test()


def load_truth_last(data: Any) -> None:
    """Load annotations after resizing: pictures show the image as it is, with its own boxes."""
    for dataset in dicts(data):
        steps = list(dataset.get("pipeline") or [])
        kinds = [step.get("type") for step in steps]
        if "LoadAnnotations" in kinds and "Resize" in kinds:
            truth = steps.pop(kinds.index("LoadAnnotations"))
            last = max(i for i, step in enumerate(steps) if step.get("type") == "Resize")
            steps.insert(last + 1, truth)
            dataset["pipeline"] = steps


def _runner(config: Any, arguments: argparse.Namespace, *parts: str) -> Any:
    """Build mmengine's Runner, with support for several processes on CPUs.

    The annotations and classes of the data sets of these parts are checked.
    """
    from mmengine.dist import barrier
    from mmengine.logging import print_log
    from mmengine.runner import Runner

    from dense import annotations, checks, loading
    from dense.backbone import HorNet
    from dense.classes import check_heads, check_widths

    if arguments.launcher != "none":
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
        if not torch.cuda.is_available():
            if arguments.launcher != "pytorch":
                raise UserError(f"--launcher {arguments.launcher} needs GPUs")
            # mmengine would use NCCL, and give DDP the index of a GPU
            init_distributed(device="cpu")
            wrapper = {"type": "MMDistributedDataParallel", "device_ids": None}
            config.model_wrapper_cfg = wrapper | {"broadcast_buffers": False}
            for part in dicts(config.model):
                if part.get("type") == "SyncBN":
                    part["type"] = "BN"
    _check_roots(config, parts)
    is_one = arguments.launcher == "none"
    place = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    given = copy.deepcopy(config)
    # the first process of each machine writes: their disks may differ
    lines = annotations.use_checked(config, parts, is_one or place == 0)
    check_heads(config, parts)
    loading.use_safe_readers()
    runner = Runner.from_cfg(config)
    if runner.rank == 0:  # with the names of one's own files, which may be corrected
        given.dump(Path(runner.work_dir) / Path(config.filename).name)
    for line in lines:
        print_log(line, "current", logging.WARNING)
    model = getattr(runner.model, "module", runner.model)
    if isinstance(getattr(model, "backbone", None), HorNet):
        check_widths(config.model, model.backbone.widths)
    barrier()  # the first process writes the repaired annotations
    accelerate(runner.model)
    for hook in (loading.PlainCheckpoints, loading.OwnFolder, loading.ConfigSchedules):
        runner.register_hook(hook())
    runner.register_hook(loading.CheckFit(is_test=hasattr(arguments, "checkpoint")))
    if config.default_scope == "mmseg":
        runner.register_hook(checks.SameSizes())
    return runner


def _check_roots(config: Any, parts: tuple[str, ...]) -> None:
    """Raise UserError if the data_root of a data set is missing, unless its paths are absolute.

    Called first, because the Runner prints the whole config.
    """
    for part in parts:
        for dataset in dicts(config.get(f"{part}_dataloader")):
            root = str(dataset.get("data_root") or "")
            paths = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
            is_unused = any(os.path.isabs(path) for path in paths if path)
            is_remote = "://" in root or dataset.get("backend_args")
            if root and not (is_unused or is_remote or Path(root).is_dir()):
                raise UserError(
                    f"the {part} data: {root} is not a folder; put the data there, or set "
                    f"data_root in {config.filename}"
                )


def _check_data(runner: Any, part: str) -> None:
    """Build the loop for `part` and check its data set; UserError if that fails."""
    from dense.checks import check

    given = runner.cfg[f"{part}_dataloader"].dataset
    try:
        loop = getattr(runner, f"{part}_loop")
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # mmdet and mmseg raise many types for broken files
        names = ("data_root", "ann_file", "data_prefix", "img_suffix")
        where = ", ".join(f"{name} {given[name]}" for name in names if given.get(name))
        # they concatenate the items of an empty data set
        why = "no image" if "need at least one array" in str(error) else repr(error)
        raise UserError(f"the {part} data ({where}) cannot be used: {why}") from error
    check(loop.dataloader.dataset)
