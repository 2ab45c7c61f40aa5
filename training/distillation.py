"""Knowledge distillation: a frozen teacher, and the losses by which a model learns from it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.flags import DistillConfig
from runtime.sizes import Size, sides


class Teacher(nn.Module):
    """A trained classifier that sees the images of another model as its own.

    Args:
        model: One of timm's interface.
        size: Height and width of its images, to which others are resized.
        mean_std, own_mean_std: Mean and standard deviation per channel by which the images are
            normalised, and those of the teacher.
        rows: The teacher's number of each class of the other model.
    """

    scale: Tensor
    shift: Tensor
    rows: Tensor

    def __init__(
        self,
        model: nn.Module,
        size: Size,
        mean_std: tuple[tuple[float, ...], tuple[float, ...]],
        own_mean_std: tuple[tuple[float, ...], tuple[float, ...]],
        rows: list[int],
    ) -> None:
        super().__init__()
        self.model, self.size = model.requires_grad_(False).eval(), sides(size)
        (mean, std), (own_mean, own_std) = (torch.tensor(pair).double() for pair in (
            mean_std, own_mean_std,
        ))  # fmt: skip
        # (x std + mean - own mean) / own std
        self.register_buffer("scale", (std / own_std).float()[:, None, None])
        self.register_buffer("shift", ((mean - own_mean) / own_std).float()[:, None, None])
        self.register_buffer("rows", torch.tensor(rows))

    @property
    def num_features(self) -> int:
        return self.model.head_hidden_size  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, features: bool = False) -> Tensor:
        """Images (N, 3, H, W) of the other model -> logits (N, classes), or pooled features."""
        images = images * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        if features:
            maps = self.model.forward_features(images)  # type: ignore[operator]
            return self.model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return self.model(images)[:, self.rows]


class Student(nn.Module):
    """A model that also returns its pooled features, projected to the width of the teacher's."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Linear(model.head_hidden_size, width)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes) and features (N, width)."""
        maps = self.model.forward_features(images)  # type: ignore[operator]
        features = self.model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return self.model.forward_head(maps), self.projection(features)  # type: ignore[operator]


@dataclass(frozen=True)
class Distillation:
    """The loss of a model and a teacher, as the flags say."""

    teacher: Teacher
    config: DistillConfig

    @property
    def by_features(self) -> bool:
        return self.config.distill == "features"

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (N, classes), or features with --distill features."""
        return self.teacher(images, self.by_features).float()

    def loss(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (1 - alpha) loss + alpha times the distance of `outputs` to the targets.

        soft: T^2 KL(teacher || model) at temperature T (https://arxiv.org/abs/1503.02531).
        hard: cross entropy to the teacher's class (https://arxiv.org/abs/2012.12877).
        features: mean squared error.
        """
        if self.by_features:
            distance = F.mse_loss(outputs, targets)
        elif self.config.distill == "hard":
            distance = F.cross_entropy(outputs, targets.argmax(dim=1))
        else:
            temperature = self.config.distill_temperature
            ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (outputs, targets))
            distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            distance = distance * temperature**2
        alpha = self.config.distill_alpha
        return (1 - alpha) * loss + alpha * distance
