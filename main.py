"""Trains or evaluates a model: flags -> setup -> build -> train or evaluate.

python main.py --config recipes/digits.yaml
torchrun --nproc_per_node=8 main.py --model hornet_tiny_7x7 --data_path /path/to/imagenet-1k ...
"""

import sys
from typing import NoReturn

from cli import parse_args
from config import Config
from runtime.errors import UserError


def read_command_line() -> Config:
    try:
        return parse_args()
    except UserError as error:
        fail(error)


def fail(error: UserError) -> NoReturn:
    """Ends the program with the error's text in one line."""
    # an error in a loader process arrives with that process's traceback before it
    message = str(error).rpartition("runtime.errors.UserError: ")[2]
    sys.exit(f"main.py: error: {' '.join(message.split())}")


if __name__ == "__main__":  # --help and wrong flags are answered before the imports of seconds
    CONFIG = read_command_line()

import logging
import time

import torch.distributed as dist
from torch import nn

from checkpoints.fitting import check_classes, load_start_weights
from checkpoints.reading import read_checkpoint
from checkpoints.run_folder import RunFolder
from checkpoints.sources import local_file, with_model_of_weights
from datasets import Data, build_data, fetch_data, file_name, image_count
from engine import BadRun, train_one_epoch
from evaluation import bad_images_of, evaluate_checkpoint, evaluate_epoch
from loaders import epoch_batches, images_of_step, train_loader
from runtime.distributed import (
    DistributedContext,
    absent_ranks,
    barrier,
    broadcast,
    close_distributed,
    first_on_each_machine,
    init_distributed,
)
from runtime.interrupts import Stopped, Watch
from runtime.logging import plot_curves, setup_logging
from runtime.trackers import Trackers
from smoke import shrunk
from trainer import build_model, build_trainer, changed_flags, prepare_model, size_facts
from utils import seed_everything, stream_seed, versions

logger = logging.getLogger("main")


def run(config: Config) -> None:
    """The whole run of this process: training, or the evaluation of a checkpoint."""
    context = init_distributed(config.runtime)
    setup_logging(context)
    if config.runtime.smoke:
        logger.info("smoke run: a few steps of a small network, no results")
        config = shrunk(config)
    config = with_model_of_weights(config, context)
    only_eval = config.evaluation.eval
    with first_on_each_machine(context):
        fetch_data(config.data)
    data = build_data(
        config.data,
        config.augment,
        config.model.input_size,
        with_train=not only_eval,
        with_val=only_eval or not config.evaluation.disable_eval,
    )
    seed_everything(config.runtime.seed)  # the same first weights in every process
    model = build_model(config.model, len(data.classes))
    model = prepare_model(model, config.compute, context.device)
    logger.info("%s, %d process(es), %s", context.device, context.world_size, versions())
    try:
        if only_eval:
            evaluate_checkpoint(config, model, data, context)
        else:
            with RunFolder(config.checkpoint, context.is_main).claimed():
                train(config, model, data, context)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                f"a loader process ended, perhaps for want of memory: lower --num_workers; {error}"
            ) from None
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        absent = ", ".join(map(str, absent_ranks(context)))
        who = f"rank {absent} of {context.world_size}" if absent else "another process"
        raise UserError(
            f"{who} does not answer (ended, or for longer than --dist_timeout "
            f"{config.runtime.dist_timeout:g}): see its output; {error}"
        ) from None


def train(config: Config, model: nn.Module, data: Data, context: DistributedContext) -> None:
    """All epochs, each with its evaluation, its line in log.txt and its checkpoints."""
    assert data.train is not None
    num_classes = len(data.classes)
    folder = RunFolder(config.checkpoint, context.is_main)
    resume_from = broadcast(folder.to_resume() if context.is_main else "", context)
    if config.finetune.finetune and not resume_from:
        load_start_weights(model, config.finetune, data.classes, context)
    trainer = build_trainer(config, model, image_count(data.train), num_classes, context)
    if resume_from:
        state = read_checkpoint(local_file(resume_from, context), model)
        check_classes(state, data.classes, resume_from)
        for change in changed_flags(state, config):
            logger.info("flag changed since %s: %s", resume_from, change)
        trainer.load_state_dict(state, resume_from)
        logger.info("resumed %s at epoch %d, after %d of its images", resume_from,
                    trainer.progress.epoch + 1, trainer.progress.position)  # fmt: skip
        del state
    if trainer.progress.epoch + 1 >= config.schedule.epochs:
        logger.info("nothing to train: epoch %d of --epochs %d is done",
                    trainer.progress.epoch, config.schedule.epochs)  # fmt: skip
        return
    facts = size_facts(config.model, num_classes)
    logger.info("%s: %s", config.model.model, facts)
    extras = {"args": config.flat(), "classes": data.classes}
    folder.begin(config)
    folder.set_aside(resume_from, trainer.progress.epoch)
    if trainer.progress.step == 0:
        folder.save(trainer.state_dict() | extras, "start")

    trackers = Trackers(config, context.is_main)
    loader = train_loader(
        data.train, config.data, context, bad_images_of(config), config.runtime.seed
    )
    started = time.perf_counter()
    progress = trainer.progress
    watch = Watch(context, config.checkpoint.save_ckpt_minutes)
    saved_step = progress.step

    def save_or_stop() -> None:
        """Saves inside the epoch where that is due, and stops the run where it was told to."""
        nonlocal saved_step
        save, number = watch.ask()
        every = config.checkpoint.save_ckpt_steps
        is_due = save or every and progress.step % every == 0 and progress.step != saved_step
        # after bad steps the weights may be beyond help: older files stay rather than these
        if number or is_due and not trainer.bad_steps.in_a_row:
            folder.save_step(trainer.state_dict() | extras, progress.epoch + 1, progress.step)
            saved_step = progress.step
            watch.saved()
        if number:
            barrier()  # with the first that leaves a launcher ends the one that saves too
            raise Stopped(number, bool(folder.config.output_dir) and folder.config.save_ckpt)

    with watch.listening():
        for epoch in range(progress.epoch + 1, config.schedule.epochs):
            # what a stream of images draws at random; all else has seeds of its own
            seed_everything(stream_seed("epoch", config.runtime.seed, epoch, context.rank))
            batches = epoch_batches(loader, epoch, progress.position, context.world_size)
            try:
                metrics = train_one_epoch(trainer, batches, config.logging, trackers, save_or_stop)
            except BadRun as bad:
                since = progress.step - bad.report["step"]
                images = images_of_step(loader, trainer.total_batch, progress.position, since)
                names = [file_name(data.train, index) for index in images]
                path = folder.report(bad.report | {"images": names})
                raise UserError(f"{bad}; more of it is in {path}" if path else str(bad)) from None
            record = {f"train_{name}": value for name, value in metrics.items()}
            test_record, improved = evaluate_epoch(config, trainer, data, save_or_stop)
            record |= test_record
            trainer.end_epoch()
            trackers.write(record, trainer.progress.step)
            folder.log(record | {"epoch": epoch} | facts)
            state = trainer.state_dict() | extras
            for name in improved:
                folder.save(state, name)
            folder.save_epoch(state, epoch, is_last=epoch + 1 == config.schedule.epochs)
    if config.logging.wandb_ckpt and folder.writes:
        trackers.save(sorted(folder.path.glob("checkpoint-*.pth")))
    trackers.close()
    logger.info("trained in %.0f s", time.perf_counter() - started)
    if folder.writes:
        logger.info("curves: %s", plot_curves(folder.path))


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
        sys.exit("main.py: interrupted; the same command continues after the last saved epoch")
    close_distributed()


if __name__ == "__main__":
    main(CONFIG)
