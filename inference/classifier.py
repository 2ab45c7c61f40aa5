"""A trained classifier with its classes and preprocessing, from a checkpoint or exported file."""

import argparse
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

from checkpoints.fitting import load_saved
from checkpoints.reading import (
    classes_in,
    ema_weights_in,
    flags_in,
    heads_of,
    is_multi_label,
    read_checkpoint,
    weights_in,
)
from checkpoints.sources import local_file, model_of
from config.flags import DataConfig, ModelConfig
from inference.exported import FORMATS, Exported
from inference.preprocessing import Preprocessing, preprocessing_of
from input_pipeline.transforms import mean_std
from models import accelerate, checkpoint_filter_fn
from runtime.distributed import SINGLE_PROCESS, DistributedContext
from runtime.errors import UserError
from runtime.sizes import Size, as_size, size_text
from training.build import build_model
from utils import numbered_classes

# heads of mmdet's and mmseg's models; classifiers have others, such as EfficientNet's conv_head
DENSE_HEAD = re.compile(r"(module\.)?(rpn|roi|bbox|mask|panoptic|decode|auxiliary)_head\.")


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode: preprocessed images (N, 3, H, W) -> logits of `classes`."""

    model: nn.Module
    config: ModelConfig  # of an exported file only the model's name and input size
    classes: list[str]
    preprocessing: Preprocessing
    flags: dict[str, Any] = field(default_factory=dict)  # of the run that trained it, if any
    named: bool = True  # whether the classes have names, or are numbered
    multi_label: bool = False  # whether an image may have any number of the classes

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) -> probabilities, of each class by itself if multi_label."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)

    @cached_property
    def labels(self) -> list[str]:
        """The classes, with those of ImageNet in words."""
        return in_words(self.folders)

    @cached_property
    def folders(self) -> list[str]:
        """The folder names of the classes: synsets for ImageNet-1K."""
        info = ImageNetInfo()
        is_imagenet = not self.named and len(self.classes) == info.num_classes()
        return info.label_names() if is_imagenet else self.classes

    def inputs(self, files: list[Path]) -> torch.Tensor:
        """Return preprocessed images (N, 3, H, W); UserError for an unreadable file."""
        view = self.preprocessing
        return torch.stack([view.transform(view.load(file)) for file in files])

    def truth(self, files: list[Path]) -> torch.Tensor | None:
        """Return labels by the files' folders; None if a file is in no class folder.

        It is the outermost one below the folder that all files share, as in training. None also
        where images have any number of classes.
        """
        if self.multi_label:
            return None
        index = {normalize("NFC", name): label for label, name in enumerate(self.folders)}
        folders = [file.absolute().parent for file in files]
        shared = Path(os.path.commonpath(folders))
        above = [shared.name, *(folder.name for folder in shared.parents)]
        labels = []
        for folder in folders:
            names = map(partial(normalize, "NFC"), (*folder.relative_to(shared).parts, *above))
            labels.append(next((index[name] for name in names if name in index), None))
        return None if None in labels else torch.tensor(labels)


def load_classifier(
    source: str,
    model: str = "",
    ema: bool = False,
    input_size: Size | None = None,
    takes_exported: bool = True,
    context: DistributedContext = SINGLE_PROCESS,
) -> Classifier:
    """Load a checkpoint of this project, the release or timm, or a file of tools.export.

    A checkpoint is found (checkpoints/sources.py), read (reading.py), and its weights, under the
    model's names (models/pretrained.py), loaded into a new model (fitting.py).

    Args:
        source: Path, URL, or name of published weights; a folder in timm's format.
        model: Name of the model, if the checkpoint does not name it.
        input_size: Pixels; by default those of the checkpoint's run.
        takes_exported: Accept exported files, whose weights have no names.

    Raises UserError if the file cannot be downloaded or read, or does not fit the model.
    """
    if source.endswith((*FORMATS.values(),)):
        if not takes_exported:
            raise UserError(f"{source} is exported: give the checkpoint that it was made of")
        return _exported_classifier(Path(source), model, ema, input_size)
    path = local_file(source, context)
    checkpoint = read_checkpoint(path)
    flags = flags_in(checkpoint)
    weights = ema_weights_in(checkpoint, path) if ema else weights_in(checkpoint, path)
    if weights is None:
        raise UserError(f"checkpoint {path} has no EMA")
    if any(map(DENSE_HEAD.match, weights)):
        raise UserError(
            f"checkpoint {path} is of a detector or segmentor: use object_detection.predict or "
            "semantic_segmentation.predict CONFIG CHECKPOINT IMAGE, or tools.web --config CONFIG"
        )
    config = model_of(source, flags | ({"model": model.split(".")[0]} if model else {}))
    cfg = timm.get_pretrained_cfg(config.model)  # None for unknown names
    num_classes = _num_classes(weights, heads_of(cfg or {})[0], path)
    channels = flags.get("in_chans") or 3
    if type(channels) is not int or channels < 1:
        raise UserError(f"checkpoint {path}: its flag in_chans is {channels!r}")
    network = build_model(replace(config, drop_path=0.0), num_classes, channels)
    load_saved(network, checkpoint, checkpoint_filter_fn(weights, network), path)
    if input_size is None and "input_size" not in flags and cfg:
        input_size = as_size(cfg.input_size[1:])
    config = replace(config, input_size=input_size or config.input_size)
    known = classes_in(checkpoint, path)
    names = known or numbered_classes(num_classes)
    if len(names) != num_classes:
        raise UserError(f"checkpoint {path}: its classes are not a list of {num_classes} names")
    preprocessing = preprocessing_of(flags, config.input_size, path)
    network = accelerate(network.eval())
    return Classifier(
        network, config, names, preprocessing, flags, bool(known), is_multi_label(flags)
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `classifier_of` reads."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="path, URL, or name of published weights")
    add("--model", default="", help="its model, if the checkpoint does not name it")
    add("--ema", action="store_true", help="take the EMA of the weights")
    add_size_flag(parser)


def add_size_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-size", "--input_size", type=_size, metavar="PIXELS",
        help="side, or HEIGHTxWIDTH; by default as in the checkpoint's run")  # fmt: skip


def _size(text: str) -> Size:
    try:
        return as_size([int(side) for side in text.split("x")])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give pixels, as in 224 or 224x320") from None


def classifier_of(args: argparse.Namespace, takes_exported: bool = True) -> Classifier:
    return load_classifier(args.checkpoint, args.model, args.ema, args.input_size, takes_exported)


def untrained_classifier(network: nn.Module, model: str, input_size: Size) -> Classifier:
    """Return a network with the default preprocessing and numbered classes."""
    config = ModelConfig(model=model, input_size=input_size)
    classes = numbered_classes(network.num_classes)  # type: ignore[arg-type]
    view = Preprocessing(input_size, *mean_std(DataConfig()))
    return Classifier(network, config, classes, view, named=False)


def _exported_classifier(path: Path, model: str, ema: bool, input_size: Size | None) -> Classifier:
    network = Exported(path)
    facts, own = network.facts, network.preprocessing.input_size
    size = input_size or own
    if model or ema or (size != own and not facts.any_size):
        raise UserError(
            f"{path} is exported: its model, weights and input size ({size_text(own)}) are fixed"
        )
    config = ModelConfig(model=facts.model, input_size=size)
    preprocessing = replace(network.preprocessing, input_size=size)
    return Classifier(
        network.eval(), config, facts.classes, preprocessing, multi_label=facts.multi_label
    )


def _num_classes(weights: dict[str, torch.Tensor], head: str, path: Path) -> int:
    for key, value in weights.items():
        if f".{key}".endswith(f".{head}.bias"):
            return len(value)
    raise UserError(f"checkpoint {path} has no head {head}.bias: it cannot tell classes")


def in_words(classes: list[str]) -> list[str]:
    """Replace ImageNet-1K's synsets by descriptions."""
    info = ImageNetInfo()
    if set(classes) <= set(info.label_names()):
        return [info.label_name_to_description(name) for name in classes]
    return classes
