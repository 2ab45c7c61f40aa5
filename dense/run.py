"""Training and testing of detectors and segmentors: mmengine's Runner behind the known flags.

`python -m object_detection.train CONFIG ...` and its three siblings call `main`. Flags are those of
the tools of mmdet 3 and mmseg 1, with the older names of the released commands.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from dense.configs import dicts, read_config
from runtime.distributed import close_distributed, init_distributed
from runtime.errors import UserError

NUMBERED = r"(epoch|iter)_\d+\.pth"


def main(task: str, action: str, argv: list[str] | None = None) -> int:
    """Trains or tests; returns the status of the process.

    Args:
        task: 'object_detection' or 'semantic_segmentation'.
        action: 'train' or 'test'.
        argv: The command line; `sys.argv[1:]` if not given.
    """
    program = f"{task}.{action}"
    try:
        need_stack()
        try:
            arguments = parser(program, action).parse_args(argv)
        except ValueError:
            raise UserError("--cfg-options: give settings as NAME=VALUE") from None
        config = load_config(arguments, task)
        (_train if action == "train" else _test)(config, arguments)
    except (UserError, OSError) as error:
        # from a loader's process it comes with that process's traceback before it
        message = str(error).rpartition(f"{type(error).__name__}: ")[2]
        sys.stderr.write(f"{program}: error: {' '.join(message.split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; --resume continues after the last checkpoint\n")
        return 1
    close_distributed()
    return 0


def need_stack() -> None:
    """Raises UserError where the mm stack is not installed."""
    try:
        import mmdet  # noqa: F401
        import mmseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: run `make dense` once") from None


def parser(program: str, action: str) -> argparse.ArgumentParser:
    from mmengine.config import DictAction

    this = argparse.ArgumentParser(f"python -m {program}")
    this.add_argument("config", help="a file under configs/")
    if action == "test":
        this.add_argument("checkpoint", help="weights of a whole model: a path or address")
    this.add_argument("--work-dir", help="folder of logs and checkpoints (work_dirs/CONFIG)")
    this.add_argument(
        "--cfg-options", "--options", nargs="+", action=DictAction, help="settings, as a.b=value"
    )
    this.add_argument("--launcher", choices=["none", "pytorch", "slurm"], default="none")
    this.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by launchers")
    if action == "train":
        this.add_argument("--amp", action="store_true", help="mixed precision (on a GPU)")
        this.add_argument("--auto-scale-lr", action="store_true", help="the rate follows the batch")
        this.add_argument(
            "--resume", nargs="?", const="auto", help="a checkpoint, or the newest of work-dir"
        )
        this.add_argument("--resume-from", dest="resume", help="older name of --resume")
        this.add_argument("--load-from", help="weights of a whole model to start from")
        this.add_argument("--no-validate", action="store_true", help="train without evaluation")
        this.add_argument(
            "--smoke", action="store_true", help="two steps of a small network on drawn data"
        )
    else:
        this.add_argument(
            "--out", help="for the predictions: detectors a file (.pkl), segmentors a folder"
        )
        this.add_argument("--show-dir", help="folder for pictures of the predictions")
        this.add_argument("--tta", "--aug-test", action="store_true", help="at several views")
        this.add_argument("--eval", nargs="+", help="understood; the config's metrics are computed")
    return this


def load_config(arguments: argparse.Namespace, task: str) -> Any:
    """The config with the command line's settings; `model.pretrained` goes to the backbone.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    config = read_config(arguments.config, task)
    options = dict(arguments.cfg_options or {})
    if "model.pretrained" in options:
        options["model.backbone.pretrained"] = options.pop("model.pretrained")
    config.merge_from_dict(options)
    config.launcher = arguments.launcher
    name = Path(arguments.config).stem
    config.work_dir = arguments.work_dir or config.get("work_dir") or f"work_dirs/{name}"
    return config


def _train(config: Any, arguments: argparse.Namespace) -> None:
    import torch

    from dense.smoke import shrink

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
    source = arguments.load_from or config.get("load_from")
    resume = arguments.resume or ("auto" if config.get("resume") and not source else None)
    if resume == "auto":
        found = newest_checkpoint(Path(config.work_dir))
        if found is None:
            sys.stderr.write(
                f"--resume: {config.work_dir} has no checkpoint, the run starts anew\n"
            )
    else:
        found = resume
    config.resume = found is not None
    config.load_from = found or source
    if config.resume:
        config.model.backbone.pretrained = None  # it may be out of reach by now
    runner = _runner(config, arguments)
    _check_data(runner, "train")
    iterations = runner.train_loop.max_iters
    for step in config.param_scheduler:
        is_warm_up = step.type == "LinearLR" and not step.get("by_epoch", True)
        if is_warm_up and step.get("end", 0) > iterations:
            raise UserError(
                f"the warm-up of {step.end} iterations is longer than the training of "
                f"{iterations}: lower its end in the config's param_scheduler"
            )
    if config.get("val_cfg") is not None:
        _check_data(runner, "val")
    runner.train()


def newest_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a work folder, wherever that lies by now."""
    note = folder / "last_checkpoint"  # written when the checkpoint was
    if note.is_file():
        found = folder / Path(note.read_text().strip()).name
        if found.is_file():
            return str(found)
    numbered = [path for path in folder.glob("*_*.pth") if re.fullmatch(NUMBERED, path.name)]
    return str(max(numbered, key=lambda path: path.stat().st_mtime, default="")) or None


def _test(config: Any, arguments: argparse.Namespace) -> None:
    from mmdet.evaluation import DumpDetResults

    from dense.tta import use_several_views

    config.load_from = arguments.checkpoint
    if arguments.show_dir:
        hook = config.default_hooks.visualization
        hook.draw = True
        folder = str(Path(arguments.show_dir).resolve())
        if config.default_scope == "mmdet":
            hook.test_out_dir = folder
        else:
            config.visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": folder}]
    if arguments.tta:
        use_several_views(config)
    if arguments.out and config.default_scope == "mmseg":
        config.test_evaluator.output_dir = arguments.out
    elif arguments.out and not arguments.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out {arguments.out}: give a name that ends in .pkl")
    runner = _runner(config, arguments)
    _check_data(runner, "test")
    if arguments.out and config.default_scope == "mmdet":
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=arguments.out))
    runner.test()


def _runner(config: Any, arguments: argparse.Namespace) -> Any:
    """mmengine's Runner; on CPUs too where a launcher started several processes."""
    import torch
    from mmengine.runner import Runner

    from dense.loading import CheckFit, PlainCheckpoints, use_safe_readers
    from models import accelerate

    if arguments.launcher != "none":
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
        if not torch.cuda.is_available():
            if arguments.launcher != "pytorch":
                raise UserError(f"--launcher {arguments.launcher} needs GPUs")
            # mmengine joins processes by NCCL, and hands DDP the number of a GPU
            init_distributed(device="cpu")
            wrapper = {"type": "MMDistributedDataParallel", "device_ids": None}
            config.model_wrapper_cfg = wrapper | {"broadcast_buffers": False}
            for part in dicts(config.model):
                if part.get("type") == "SyncBN":
                    part["type"] = "BN"
    use_safe_readers()
    runner = Runner.from_cfg(config)
    accelerate(runner.model)
    runner.register_hook(PlainCheckpoints())
    if config.load_from:
        is_test = hasattr(arguments, "checkpoint")
        runner.register_hook(CheckFit(config.load_from, is_test, config.get("resume", False)))
    return runner


def _check_data(runner: Any, part: str) -> None:
    """Builds the data set of a loop, and checks it; raises UserError where that fails."""
    from dense.checks import check

    given = runner.cfg[f"{part}_dataloader"].dataset
    if isinstance((given.get("metainfo") or {}).get("classes"), str):
        raise UserError(f"classes is one word: write ({given.metainfo.classes!r},)")
    try:
        loop = getattr(runner, f"{part}_loop")
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # what comes of broken files is for mmdet and mmseg to choose
        where = ", ".join(
            f"{name} {given[name]}"
            for name in ("data_root", "ann_file", "data_prefix", "img_suffix")
            if given.get(name)
        )
        # an empty data set is an array without parts to them
        why = "no image" if "need at least one array" in str(error) else repr(error)
        raise UserError(f"the {part} data ({where}) cannot be used: {why}") from error
    check(loop.dataloader.dataset)
