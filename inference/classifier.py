"""A trained classifier with its classes and preprocessing, out of a checkpoint or exported file."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from checkpoints.fitting import heads_by_cfg, load_exactly
from checkpoints.reading import (
    classes_in,
    ema_weights_in,
    flags_in,
    read_checkpoint,
    weights_in,
)
from checkpoints.sources import local_file, model_of
from config import DataConfig, ModelConfig
from inference.exported import FORMATS, Exported
from input_pipeline.images import load_image
from input_pipeline.transforms import CROP_PCT, eval_transform, is_warped, mean_std
from models import accelerate, checkpoint_filter_fn
from runtime.errors import UserError
from training.build import build_model
from utils import numbered_classes


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model."""

    input_size: int
    """Height and width in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None = None
    """Fraction of the short side that is shown; None where the image is warped to the square."""

    @cached_property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        return eval_transform(self.input_size, self.mean, self.std, self.crop_pct)


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode: preprocessed images (N, 3, S, S) -> logits of `classes`."""

    model: nn.Module
    config: ModelConfig
    """What the model is an instance of; of an exported file only the name."""
    classes: list[str]
    preprocessing: Preprocessing
    flags: dict[str, Any] = field(default_factory=dict)
    """The flags of the run that it comes from, if any."""

    @cached_property
    def labels(self) -> list[str]:
        """The classes, those of ImageNet in words."""
        return in_words(self.classes)

    @cached_property
    def folders(self) -> list[str]:
        """The names of the classes' folders of images; of ImageNet-1K its synsets."""
        info = ImageNetInfo()
        is_imagenet = self.classes == numbered_classes(info.num_classes())
        return info.label_names() if is_imagenet else self.classes

    def inputs(self, files: list[Path]) -> torch.Tensor:
        """Image files as the model takes them, (N, 3, S, S); UserError for an unreadable one."""
        return torch.stack([self.preprocessing.transform(load_image(str(f))) for f in files])

    def truth(self, files: list[Path]) -> torch.Tensor | None:
        """The label of each file by its folder's name; None where one is no class."""
        index = {name: label for label, name in enumerate(self.folders)}
        labels = [index.get(file.parent.name) for file in files]
        return None if None in labels else torch.tensor(labels)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --model, --ema and --input-size: the arguments of `load_classifier`."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="path, address, or name of published weights")
    add("--model", default="", help="its model, where the checkpoint names none")
    add("--ema", action="store_true", help="take the EMA of the weights")
    add("--input-size", "--input_size", type=int,
        help="pixels; as in the checkpoint's run if not given")  # fmt: skip


def load_classifier(
    source: str,
    model: str = "",
    ema: bool = False,
    input_size: int | None = None,
    takes_exported: bool = True,
) -> Classifier:
    """The classifier of a checkpoint: of this project, of the release, or published by name.

    Args:
        source: Path, address, or name of published weights; a folder in the form of timm; or a file
            of tools.export.
        model: Name of the model, where the checkpoint does not name it.
        ema: Take the EMA of the weights.
        input_size: Height and width of the images; those of the checkpoint's run if not given.
        takes_exported: Whether a file of tools.export will do, too; it has no weights by name.

    Raises:
        UserError: the file can't be had, read, or does not fit the model.
    """
    if Path(source).suffix in FORMATS.values():
        if not takes_exported:
            raise UserError(f"{source} is exported: give the checkpoint that it was made of")
        return _exported_classifier(Path(source), model, ema, input_size)
    path = local_file(source)
    checkpoint = read_checkpoint(path)
    flags = flags_in(checkpoint)
    config = model_of(source, flags | ({"model": model.split(".")[0]} if model else {}))
    weights = ema_weights_in(checkpoint, path) if ema else weights_in(checkpoint, path)
    if weights is None:
        raise UserError(f"checkpoint {path} holds no EMA")
    num_classes = _rows_of_head(weights, config.model, path)
    network = build_model(replace(config, drop_path=0.0), num_classes)
    load_exactly(network, checkpoint_filter_fn(weights, network), path)
    cfg = timm.get_pretrained_cfg(config.model) if timm.is_model(config.model) else None
    if input_size is None and "input_size" not in flags and cfg:
        input_size = cfg.input_size[-1]
    config = replace(config, input_size=input_size or config.input_size)
    names = classes_in(checkpoint, path) or numbered_classes(num_classes)
    if len(names) != num_classes:
        raise UserError(f"checkpoint {path}: its classes are no list of {num_classes} names")
    preprocessing = _preprocessing(flags, config.input_size, path)
    return Classifier(accelerate(network.eval()), config, names, preprocessing, flags)


def untrained_classifier(network: nn.Module, model: str, input_size: int) -> Classifier:
    """A network that has learnt nothing, with the default preprocessing and numbered classes."""
    num_classes: int = network.num_classes  # type: ignore[assignment]
    config = ModelConfig(model=model, input_size=input_size)
    crop_pct = None if is_warped(input_size) else CROP_PCT
    preprocessing = Preprocessing(input_size, *mean_std(DataConfig()), crop_pct)
    return Classifier(network, config, numbered_classes(num_classes), preprocessing)


def _exported_classifier(path: Path, model: str, ema: bool, input_size: int | None) -> Classifier:
    network = Exported(path)
    facts = network.facts
    size = input_size or facts.input_size
    if model or ema or (size != facts.input_size and not facts.any_size):
        raise UserError(
            f"{path} is exported: its model, weights and input size ({facts.input_size}) are fixed"
        )
    crop_pct = None if is_warped(size) else facts.crop_pct or CROP_PCT
    preprocessing = Preprocessing(size, tuple(facts.mean), tuple(facts.std), crop_pct)
    config = ModelConfig(model=facts.model, input_size=size)
    return Classifier(network.eval(), config, facts.classes, preprocessing)


def _rows_of_head(weights: dict[str, torch.Tensor], model: str, path: Path) -> int:
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    name = f"{heads_by_cfg(cfg or {})[0]}.bias"
    for key, value in weights.items():
        if key == name or key.endswith("." + name):
            return len(value)
    raise UserError(f"checkpoint {path} has no head {name}: it cannot tell classes")


def _preprocessing(flags: dict[str, Any], size: int, path: Path) -> Preprocessing:
    """What a checkpoint's flags ask for, of this project's runs or of timm's."""
    of_imagenet = flags.get("imagenet_default_mean_and_std", True)
    mean, std = mean_std(DataConfig(imagenet_default_mean_and_std=bool(of_imagenet)))
    try:
        mean, std = (
            tuple(map(float, flags.get(name) or default))
            for name, default in (("mean", mean), ("std", std))
        )
        if size < 1:
            raise ValueError(f"input size {size}")
        crop_pct = float(flags.get("crop_pct") or CROP_PCT)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}")
        if not 0.05 < crop_pct <= 1:
            raise ValueError(f"crop_pct {crop_pct}")
        mode = flags.get("crop_mode") or ("squash" if is_warped(size) else "center")
        if (mode == "squash") != is_warped(size) or mode not in ("center", "squash"):
            raise ValueError(f"crop_mode {mode} at {size} pixels, which this project does not have")
        if flags.get("crop_mode") == "squash" and crop_pct != 1:
            raise ValueError(f"crop_pct {crop_pct} of the squashed image")
        if flags.get("interpolation") not in (None, "bicubic"):
            raise ValueError(f"interpolation {flags['interpolation']} instead of bicubic")
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: its images cannot be prepared: {error}") from None
    return Preprocessing(size, mean, std, None if is_warped(size) else crop_pct)


def in_words(classes: list[str]) -> list[str]:
    """ImageNet-1K's descriptions where the names are its synsets, or a thousand bare numbers."""
    info = ImageNetInfo()
    if classes == numbered_classes(info.num_classes()):
        return [info.index_to_description(label) for label in range(len(classes))]
    if set(classes) <= set(info.label_names()):
        return [info.label_name_to_description(name) for name in classes]
    return classes
