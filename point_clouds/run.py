"""Training and testing on point clouds with main.py's trainer.

python -m point_clouds.train CONFIG --data_path DIR --output_dir DIR
python -m point_clouds.test CONFIG CHECKPOINT --data_path DIR
"""

import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import main as trainer
import point_clouds.p2p  # noqa: F401 - registers the model with timm
from point_clouds.datasets import MissingPartError, build_data, check_data
from point_clouds.flags import PointCloudConfig, parse_args
from runtime.distributed import DistributedContext, all_gather
from runtime.errors import UserError, exit_on_user_error

logger = logging.getLogger("point_clouds")


def main(action: str, argv: list[str] | None = None) -> None:
    """Train or test, as `action` says, and exit with a status as main.py does."""
    program = f"point_clouds.{action}"
    names = ["CONFIG"] if action == "train" else ["CONFIG", "CHECKPOINT"]
    arguments = sys.argv[1:] if argv is None else argv
    with exit_on_user_error(program):
        if not {"-h", "--help"} & {*arguments}:
            given, flags = arguments[: len(names)], arguments[len(names) :]
            if len(given) < len(names) or any(value.startswith("-") for value in given):
                raise UserError(f"expected python -m {program} {' '.join(names)} --data_path DIR")
            evaluates = ["--eval", "true", "--resume", *given[1:]] if action == "test" else []
            arguments = ["--config", given[0], *flags, *evaluates]
        config = parse_args(arguments)
        if action == "train" and config.evaluation.eval:
            raise UserError("--eval true: use python -m point_clouds.test CONFIG CHECKPOINT")
    body = train_and_vote if action == "train" else vote
    trainer.main(config, body, program)  # type: ignore[arg-type]


def train_and_vote(config: PointCloudConfig) -> None:
    """Train, and test the best checkpoint by the vote of 40 views."""
    context = _run(config)
    best = Path(config.checkpoint.output_dir) / "checkpoint-best.pth"
    is_there = bool(config.checkpoint.output_dir) and best.is_file()
    if not all_gather(is_there, context)[0]:  # the first process writes it
        logger.info("there is no checkpoint-best.pth to test")
        return
    evaluation = replace(config.evaluation, eval=True)
    checkpoint = replace(config.checkpoint, resume=str(best))
    try:
        vote(replace(config, evaluation=evaluation, checkpoint=checkpoint), context)
    except MissingPartError as error:
        logger.warning("no vote: %s", error)


def vote(config: PointCloudConfig, context: DistributedContext | None = None) -> None:
    """Log the accuracy on the test clouds, by the vote of 40 views, and write predictions.csv."""
    kwargs = config.model.model_kwargs | {"vote": True}
    config = replace(config, model=replace(config.model, model_kwargs=kwargs))
    _run(config, context)


def _run(config: PointCloudConfig, context: DistributedContext | None = None) -> DistributedContext:
    opening = partial(build_data, points=config.points)
    return trainer.run(config, opening, context, check_data)
