"""Training and testing of detectors and segmentors: mmengine's Runner behind the known flags.

`python -m object_detection.train CONFIG ...` and its three siblings call `main`. Flags are those of
the tools of mmdet 3 and mmseg 1, with the older names of the released commands.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def main(task: str, action: str, argv: list[str] | None = None) -> int:
    """Trains or tests; returns the status of the process.

    Args:
        task: 'object_detection' or 'semantic_segmentation'.
        action: 'train' or 'test'.
        argv: The command line; `sys.argv[1:]` if not given.
    """
    program = f"{task}.{action}"
    try:
        import mmdet  # noqa: F401
        import mmseg  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"{program}: error: {error}: run `make dense` once\n")
        return 1
    arguments = parser(program, action).parse_args(argv)
    try:
        config = load_config(arguments, task)
        (_train if action == "train" else _test)(config, arguments)
    except UserError as error:
        sys.stderr.write(f"{program}: error: {' '.join(str(error).split())}\n")
        return 1
    return 0


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
    this.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
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
    else:
        this.add_argument("--out", help="file for the metrics and predictions (.pkl)")
        this.add_argument("--show-dir", help="folder for pictures of the predictions")
        this.add_argument("--tta", "--aug-test", action="store_true", help="at several sizes")
        this.add_argument("--eval", nargs="+", help="understood; the config's metrics are computed")
    return this


def load_config(arguments: argparse.Namespace, task: str) -> Any:
    """The config with the command line's settings; `model.pretrained` goes to the backbone.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    from mmengine.config import Config

    root = Path(__file__).resolve().parents[1]
    path = Path(arguments.config)
    if not path.is_file():
        path = root / task / path  # as it is written inside the tree
    if not path.is_file():
        raise UserError(f"config {arguments.config} does not exist, neither here nor in {task}/")
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can raise anything
        raise UserError(f"config {path} cannot be read: {error}") from None
    options = dict(arguments.cfg_options or {})
    if "model.pretrained" in options:
        options["model.backbone.pretrained"] = options.pop("model.pretrained")
    config.merge_from_dict(options)
    config.launcher = arguments.launcher
    config.work_dir = arguments.work_dir or config.get("work_dir") or f"work_dirs/{path.stem}"
    return config


def _train(config: Any, arguments: argparse.Namespace) -> None:
    import torch
    from mmengine.runner import Runner

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
    if arguments.resume:
        config.resume = True
        config.load_from = None if arguments.resume == "auto" else arguments.resume
    elif arguments.load_from:
        config.load_from = arguments.load_from
    Runner.from_cfg(config).train()


def _test(config: Any, arguments: argparse.Namespace) -> None:
    from mmengine.runner import Runner

    config.load_from = arguments.checkpoint
    # the checkpoint has the backbone's weights too
    config.model.backbone.pretrained = None
    if arguments.show_dir:
        hook = config.default_hooks.visualization
        hook.draw = True
        hook.test_out_dir = arguments.show_dir
    if arguments.tta:
        if "tta_pipeline" not in config:
            raise UserError("--tta: the config has no tta_pipeline")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.tta_model.module = config.model
        config.model = config.tta_model
    if arguments.out and not arguments.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out {arguments.out}: give a name that ends in .pkl")
    runner = Runner.from_cfg(config)
    if arguments.out:
        from mmengine.evaluator import DumpResults

        runner.test_evaluator.metrics.append(DumpResults(out_file_path=arguments.out))
    runner.test()
