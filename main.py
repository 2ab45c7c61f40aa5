"""Train or evaluate a model: flags -> setup -> build -> train or evaluate.

python main.py --config recipes/digits.yaml
torchrun --nproc_per_node=8 main.py --model hornet_tiny_7x7 --data_path /path/to/imagenet-1k ...
"""

from config.command_line import parse_args
from runtime.errors import exit_on_user_error
from runtime.files import check_compiler_cache

if __name__ == "__main__":  # --help and wrong flags are answered before imports that take seconds
    with exit_on_user_error("main.py"):
        CONFIG = parse_args()
        check_compiler_cache()

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from checkpoints import run_folder, sources
from config.flags import Config
from config.smoke import shrunk
from datasets import Data, build_data, check_data, fetch_data
from engine import train_one_epoch
from evaluation import Evaluation, evaluate_checkpoint, evaluate_epoch
from inference.teacher import load_distillation
from input_pipeline.loaders import TrainLoader, naming_dead_workers
from input_pipeline.unreadable import UnreadableImages
from runtime import curves, distributed, signals
from runtime.logging import TIMING_FILE, EpochTimer, setup_logging
from runtime.trackers import Trackers
from training.build import (
    build_model,
    check_name,
    check_size_schedule,
    prepare_model,
    size_facts,
    start_training,
)
from training.saving import Saver
from utils import seed_everything, use_deterministic_algorithms, versions

logger = logging.getLogger("main")


def run(
    config: Config,
    build_data: Callable[..., Data] = build_data,
    context: distributed.DistributedContext | None = None,
    check_data: Callable[..., None] = check_data,
) -> distributed.DistributedContext:
    """Train, or evaluate a checkpoint, in this process; return its place among the others.

    Another task gives its own `build_data` and `check_data`, and a program that calls it twice the
    same `context`.
    """
    if config.runtime.deterministic:
        use_deterministic_algorithms()
    if context is None:
        context = distributed.init_distributed(config.runtime.device, **asdict(config.processes))
        setup_logging(context)
        logger.info("%s, %d process(es), %s", context.device, context.world_size, versions())
    config = shrunk(config)
    timeout, is_eval = config.processes.dist_timeout, config.evaluation.eval
    with distributed.naming_absent_ranks(context, timeout), naming_dead_workers():
        if config.model.model != "auto":  # before a checkpoint is downloaded
            check_name(config.model.model)
        check_data(config.data, with_train=not is_eval, is_fetched=False)
        config, saved = sources.continued(config, context)
        check_name(config.model.model)  # before the data, which may take minutes to list
        fetch_data(config.data, context)
        with_val = is_eval or not config.evaluation.disable_eval
        data = build_data(
            *(config.data, config.augment, config.model.input_size, not is_eval, with_val),
            *(saved, context),
            **({"crops": True} if "crops" in config.evaluation.tta else {}),
        )
        seed_everything(config.runtime.seed)  # the same initial weights on all ranks
        model = build_model(config.model, len(data.classes), config.data.in_chans)
        model = prepare_model(model, config.compute, context.device)
        if is_eval:
            evaluate_checkpoint(config, model, data, context)
        else:
            train(config, model, data, saved, context)
    return context


def train(
    config: Config,
    model: nn.Module,
    data: Data,
    saved: sources.SavedRun | None,
    context: distributed.DistributedContext,
) -> None:
    """Train all epochs, each with its evaluation, log record and checkpoints."""
    images, classes = data.train, data.classes
    assert images is not None
    resume_from = saved.source if saved else ""
    folder = run_folder.RunFolder(config.checkpoint, context.is_main)
    with folder.claimed():
        state, setup = start_training(
            config,
            model,
            images,
            classes,
            resume_from,
            context,
            load_distillation(config, classes, context),
        )
        progress, epochs = state.progress, config.schedule.epochs
        if progress.epoch + 1 >= epochs:
            logger.info("nothing to train: epoch %d of --epochs %d is done", progress.epoch, epochs)
            return
        facts = size_facts(config.model, len(classes), config.data.in_chans)
        logger.info("%s: %s", config.model.model, facts)
        if config.augment.size_schedule:
            check_size_schedule(config, len(classes), facts)
        saver = Saver(state, setup, folder, classes)
        went_back = saver.begin(resume_from)
        trackers = Trackers(
            config.logging.log_dir, config.wandb_options(), context.is_main,
            config.checkpoint.output_dir, progress.step, setup.schedule.steps_per_epoch,
            saved.wandb_id if saved and folder.holds(resume_from) else "", went_back,
        )  # fmt: skip
        saver.wandb_id = trackers.wandb_id
        unreadable = UnreadableImages.of_run(config)
        seed, sampling = config.runtime.seed, config.sampling
        loader = TrainLoader(images, config.data, context, unreadable, seed, sampling)
        evaluation = Evaluation(config, data, context) if data.val else None
        started, timer = time.perf_counter(), EpochTimer(context)
        with saver.watch.listening():
            for epoch in range(progress.epoch + 1, epochs):
                timer.start(progress.position)
                batches = loader.batches(epoch, progress.position)
                with saver.reporting(loader):
                    metrics = train_one_epoch(state, setup, batches, trackers, saver.save_or_stop)
                timer.end_training(progress.position)
                if context.is_main or not folder.config.output_dir:  # then each has a list
                    unreadable.tell()
                is_due = (epoch + 1) % config.evaluation.eval_freq == 0 or epoch + 1 == epochs
                results, best = evaluate_epoch(
                    state, setup, evaluation if is_due else None, saver.save_or_stop
                )
                state.end_epoch()
                record = {f"train_{name}": value for name, value in metrics.items()} | results
                trackers.write(record, progress.step)
                folder.log(timer.record(epoch), TIMING_FILE)
                saver.end_epoch(record | {"epoch": epoch} | facts, best)
        logger.info("trained in %.0f s", time.perf_counter() - started)
        uploads = config.logging.wandb_ckpt and folder.writes
        trackers.finish(sorted(folder.path.glob("checkpoint-*.pth")) if uploads else [])
        if folder.writes:
            logger.info("curves: %s", curves.save_curves(folder.path))


def main(config: Config, body: Callable[[Config], Any] = run, program: str = "main.py") -> None:
    try:
        with exit_on_user_error(program):
            body(config)
    except signals.Stopped as stopped:
        logger.info("%s", stopped)
        distributed.close_distributed()
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; the same command resumes after the last saved epoch")
    distributed.close_distributed()


if __name__ == "__main__":
    main(CONFIG)
