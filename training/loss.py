"""The loss of a run: cross entropy, binary cross entropy or focal loss, with weights of classes."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from config.flags import LossConfig
from input_pipeline.image_sets import Images, labels_of
from runtime.errors import UserError, reason_of, some

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, classes) and labels (N), or soft or multi-hot targets (N, classes) -> mean loss."""


def build_loss(
    config: LossConfig, smoothing: float, mixes: bool, class_weights: Tensor | None = None
) -> Loss:
    """Return the loss of training.

    Args:
        smoothing: Label smoothing of labels: towards 1 / classes, of several labels per image
            towards 0.5. Soft targets are smoothed already.
        mixes: Whether the targets are soft, from mixup.
        class_weights: (classes), factors on the terms of a class as the target, from
            `class_weights_of`.
    """
    if config.loss == "bce":
        return BinaryCrossEntropy(
            smoothing, config.bce_target_thresh, pos_weight=class_weights, smooth_dense=not mixes
        )
    if mixes:
        smoothing = 0.0
    if config.loss == "focal":
        return partial(focal_loss, config=config, smoothing=smoothing)
    if class_weights is not None:
        return partial(weighted_cross_entropy, weights=class_weights, smoothing=smoothing)
    return SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(smoothing)


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float
) -> Tensor:
    """Return the cross entropy, whose terms have the weights of their classes.

    It is divided by the number of images. torch's own mean divides by the sum of their weights,
    which would make the weight of an image depend on the others of its batch and rank.
    """
    return F.cross_entropy(
        logits, targets, weights, reduction="none", label_smoothing=smoothing
    ).mean()


def focal_loss(logits: Tensor, targets: Tensor, config: LossConfig, smoothing: float) -> Tensor:
    """Return the focal loss (https://arxiv.org/abs/1708.02002) as a mean over images and classes.

    Labels become smoothed one-hot targets.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
        targets = targets * (1 - smoothing) + smoothing / logits.shape[1]
    else:
        targets = targets * (1 - smoothing) + smoothing / 2
    return sigmoid_focal_loss(logits, targets, config.focal_alpha, config.focal_gamma, "mean")


def class_weights_of(config: LossConfig, images: Images, classes: list[str]) -> Tensor | None:
    """Return the weight of each class (classes), or None without --class_weights.

    `balanced` gives each class the same total weight, and the images a mean weight of 1. UserError
    for a file that is wrong or has other classes, and for images whose labels are unknown.
    """
    if not config.class_weights:
        return None
    if config.class_weights == "balanced":
        labels = labels_of(images, "--class_weights balanced")
        counts = torch.bincount(labels, minlength=len(classes))
        return (counts.sum() / (counts.count_nonzero() * counts.clamp(min=1))).float()
    return _read_weights(Path(config.class_weights).expanduser(), classes)


def _read_weights(path: Path, classes: list[str]) -> Tensor:
    what = f"--class_weights {path}"
    try:
        content: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}; or give balanced") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{what}: not a JSON or YAML file: {reason_of(error)}") from None
    if isinstance(content, dict):
        named = {str(name): weight for name, weight in content.items()}
        unknown, missing = named.keys() - {*classes}, {*classes} - named.keys()
        if unknown or missing:
            raise UserError(
                f"{what}: other classes than the data's: only in the file {some(sorted(unknown))}, "
                f"only in the data {some(sorted(missing))}"
            )
        content = [named[name] for name in classes]
    if not isinstance(content, list) or len(content) != len(classes):
        count = f"{len(content)} weights" if isinstance(content, list) else "no list"
        raise UserError(
            f"{what}: {count} for {len(classes)} classes: give a list in their order, or the "
            "weight of each class by its name"
        )
    are_numbers = all(type(weight) in (int, float) for weight in content)
    if not are_numbers or not all(0 <= w < math.inf for w in content) or not any(content):
        raise UserError(f"{what}: weights are numbers of at least 0, and not all of them 0")
    return torch.tensor(content, dtype=torch.float32)
