"""Trains or evaluates a model: flags -> setup -> build -> train or evaluate.

python main.py --config recipes/digits.yaml
torchrun --nproc_per_node=8 main.py --model hornet_tiny_7x7 --data_path /path/to/imagenet-1k ...
"""

import sys
from typing import NoReturn

from config import Config
from config.command_line import parse_args
from runtime.errors import UserError, one_line


def fail(error: UserError) -> NoReturn:
    sys.exit(f"main.py: error: {one_line(error)}")


def read_command_line() -> Config:
    try:
        return parse_args()
    except UserError as error:
        fail(error)


if __name__ == "__main__":  # --help and wrong flags are answered before imports that take seconds
    CONFIG = read_command_line()

import logging
import time
from dataclasses import asdict

from torch import nn

from checkpoints.run_folder import RunFolder
from checkpoints.sources import with_model_of_weights
from config.smoke import shrunk
from datasets import Data, build_data, fetch_data
from engine import train_one_epoch
from evaluation import evaluate_checkpoint, evaluate_epoch
from input_pipeline.loaders import TrainLoader, naming_dead_workers
from input_pipeline.unreadable import UnreadableImages
from runtime.curves import save_curves
from runtime.distributed import (
    DistributedContext,
    broadcast,
    close_distributed,
    first_on_each_machine,
    init_distributed,
    naming_absent_ranks,
)
from runtime.logging import setup_logging
from runtime.signals import Stopped
from runtime.trackers import Trackers
from training.build import build_model, prepare_model, size_facts, start_training
from training.saving import Saver
from utils import seed_everything, versions

logger = logging.getLogger("main")


def run(config: Config) -> None:
    """The whole run of this process: training, or the evaluation of a checkpoint."""
    context = init_distributed(config.runtime.device, **asdict(config.processes))
    setup_logging(context)
    config = with_model_of_weights(shrunk(config) if config.runtime.smoke else config, context)
    with first_on_each_machine(context):
        fetch_data(config.data)
    only_eval = config.evaluation.eval
    with_val = only_eval or not config.evaluation.disable_eval
    data = build_data(config.data, config.augment, config.model.input_size, not only_eval, with_val)
    seed_everything(config.runtime.seed)  # the same initial weights on every rank
    model = build_model(config.model, len(data.classes))
    model = prepare_model(model, config.compute, context.device)
    logger.info("%s, %d process(es), %s", context.device, context.world_size, versions())
    folder = RunFolder(config.checkpoint, context.is_main)
    with naming_absent_ranks(context, config.processes.dist_timeout), naming_dead_workers():
        if only_eval:
            evaluate_checkpoint(config, model, data, context)
        else:
            with folder.claimed():
                train(config, model, data, folder, context)


def train(
    config: Config, model: nn.Module, data: Data, folder: RunFolder, context: DistributedContext
) -> None:
    """All epochs, each with its evaluation, its line in log.txt and its checkpoints."""
    images, classes = data.train, data.classes
    assert images is not None
    resume_from = broadcast(folder.to_resume() if context.is_main else "", context)
    state, setup = start_training(config, model, images.length, classes, resume_from, context)
    progress, epochs = state.progress, config.schedule.epochs
    if progress.epoch + 1 >= epochs:
        logger.info("nothing to train: epoch %d of --epochs %d is done", progress.epoch, epochs)
        return
    facts = size_facts(config.model, len(classes))
    logger.info("%s: %s", config.model.model, facts)
    saver = Saver(state, folder, config, classes, context)
    saver.begin(resume_from)
    trackers = Trackers(config.logging.log_dir, config.wandb_options(), context.is_main)
    unreadable = UnreadableImages.of_run(config)
    loader = TrainLoader(images, config.data, context, unreadable, config.runtime.seed)
    started = time.perf_counter()
    with saver.listening():
        for epoch in range(progress.epoch + 1, epochs):
            batches = loader.batches(epoch, progress.position)
            with saver.reporting(loader, setup.total_batch):
                metrics = train_one_epoch(
                    state, setup, batches, config.logging, trackers, saver.save_or_stop
                )
            results, best = evaluate_epoch(config, state, data, context, saver.save_or_stop)
            state.end_epoch()
            record = {f"train_{name}": value for name, value in metrics.items()} | results
            trackers.write(record, progress.step)
            saver.end_epoch(record | {"epoch": epoch} | facts, best)
    logger.info("trained in %.0f s", time.perf_counter() - started)
    if folder.writes:
        logger.info("curves: %s", save_curves(folder.path))
    files = folder.path.glob("checkpoint-*.pth") if config.logging.wandb_ckpt else ()
    trackers.finish(sorted(files))


def main(config: Config) -> None:
    try:
        run(config)
    except UserError as error:
        fail(error)
    except Stopped as stopped:
        logger.info("%s", stopped)
        close_distributed()
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        sys.exit("main.py: interrupted; the same command resumes after the last saved epoch")
    close_distributed()


if __name__ == "__main__":
    main(CONFIG)
