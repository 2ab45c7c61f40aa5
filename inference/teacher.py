"""The teacher of a distillation, by name or from a checkpoint."""

import logging
from pathlib import Path

import timm
from timm.data import resolve_model_data_config

from config.flags import Config, ModelConfig
from inference.classifier import Classifier, load_classifier
from inference.preprocessing import Preprocessing
from input_pipeline.transforms import mean_std
from runtime.distributed import DistributedContext, first_on_each_machine
from runtime.errors import UserError, reason_of, some
from runtime.sizes import as_size, sides, size_text
from training.distillation import Distillation, Teacher
from utils import are_names, numbered_classes

logger = logging.getLogger(__name__)


def load_distillation(
    config: Config, classes: list[str], context: DistributedContext
) -> Distillation | None:
    """Return the distillation of --teacher for images of these classes; None without a teacher.

    UserError if the teacher cannot be loaded, or lacks some of the classes.
    """
    source = config.distill.teacher
    if not source:
        return None
    try:
        is_of_timm = (
            not Path(source).exists()
            and timm.is_model(source.split(".")[0])
            and not source.startswith("hornet_")
        )
        if is_of_timm:
            trained = _of_timm(source, context)
        else:
            trained = load_classifier(source, takes_exported=False, context=context)
    except UserError as error:
        raise UserError(f"--teacher: {error}") from None
    view, by_features = trained.preprocessing, config.distill.distill == "features"
    _check_pixels(view, config)
    rows = [] if by_features else _rows(trained, classes, config)
    teacher = Teacher(
        trained.model, view.input_size, mean_std(config.data), (view.mean, view.std), rows
    )
    if by_features and not hasattr(trained.model, "head_hidden_size"):
        raise UserError(f"--distill features: --teacher {source} has no pooled features")
    logger.info("teacher %s: %s at %s pixels", source, trained.config.model,
                size_text(view.input_size))  # fmt: skip
    teacher.to(context.device)
    if config.compute.compile:
        teacher.compile()
    return Distillation(teacher, config.distill)


def _check_pixels(view: Preprocessing, config: Config) -> None:
    """UserError if the teacher takes other channels or values; warn of another aspect ratio."""
    source, data = config.distill.teacher, config.data
    if view.decoding.channels != data.in_chans:
        raise UserError(
            f"--teacher {source} takes images of {view.decoding.channels} channels, not of "
            f"--in_chans {data.in_chans}"
        )
    if view.decoding.value_range != data.value_range:
        raise UserError(
            f"--teacher {source} was trained with --value_range {view.decoding.value_range}, not "
            f"{data.value_range}"
        )
    (height, width), (own_height, own_width) = (
        sides(config.model.input_size),
        sides(view.input_size),
    )
    if height * own_width != width * own_height:
        logger.warning("--teacher %s sees the images of %d x %d pixels warped to %d x %d", source,
                       height, width, own_height, own_width)  # fmt: skip


def _of_timm(name: str, context: DistributedContext) -> Classifier:
    try:
        with first_on_each_machine(context):
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the download, of an unknown tag
        raise UserError(f"timm's {name} cannot be loaded: {reason_of(error)}") from None
    data = resolve_model_data_config(model)
    size = as_size(data["input_size"][1:])
    view = Preprocessing(size, data["mean"], data["std"])
    classes = numbered_classes(model.num_classes)  # type: ignore[arg-type]
    return Classifier(model.eval(), ModelConfig(name, input_size=size), classes, view, named=False)


def _rows(teacher: Classifier, classes: list[str], config: Config) -> list[int]:
    """Return the teacher's number of each class; classes without names have to be as many."""
    own, source = teacher.folders, config.distill.teacher
    numbers = {name: number for number, name in enumerate(own)}
    has_names = teacher.named or own != numbered_classes(len(own))
    if has_names and {*classes} <= {*own}:
        return [numbers[name] for name in classes]
    both_named = has_names and are_names(classes, config.data.data_set)
    if len(own) == len(classes) and not both_named:
        return list(range(len(classes)))
    missing = some(name for name in classes if name not in numbers)
    raise UserError(
        f"--teacher {source} has {len(own)} classes ({some(own)}), the data {len(classes)} "
        f"({some(classes)}), of which the teacher lacks {missing}"
    )
