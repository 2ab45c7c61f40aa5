"""P2P, point-to-pixel prompting: a cloud becomes an image that a frozen image classifier reads.

Source: P2P (Wang et al., NeurIPS 2022, arXiv 2208.02812). The names of the weights are those of its
release (github.com/wangzy22/P2P, commit 8530757). Shapes: clouds (B, N, 3), images (B, 3, H, W).
"""

from typing import Any, get_args

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model, swin_transformer
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

import models  # noqa: F401 - registers HorNet with timm
from point_clouds.flags import Head, UpdateType
from point_clouds.projection import centre_pixels, rotate, splat, test_views, validation_views
from runtime.errors import UserError, near_names


@torch.no_grad()
def nearest(cloud: Tensor, k: int) -> Tensor:
    """Return the k nearest points of each point, itself included: (B, N, 3) -> (B, N, k), int64."""
    # one cloud at a time: the distances of its points take N * N numbers
    centred = cloud - cloud.mean(dim=1, keepdim=True)  # far from the origin it would be inexact
    distances = (torch.cdist(points, points) for points in centred)
    found = [d.topk(k, largest=False, sorted=False).indices for d in distances]
    return torch.stack(found)


class EdgeConv(nn.Sequential):
    """Maximum over the edges (i, j) of LeakyReLU(GroupNorm(W [f_j - f_i; f_i])).

    W [f_j - f_i; f_i] = A f_j + (C - A) f_i for W = [A, C], so two products per point replace one
    per edge. The rest is monotone in each channel: the maximum, or the minimum where the scale of
    the norm is negative, can be taken before it. So no tensor of all edges is needed, neither in
    evaluation nor for the gradient.

    It is built as the layers that it computes, whose names its weights have.
    """

    def __init__(self, in_channels: int, channels: int, groups: int = 4) -> None:
        super().__init__(
            nn.Conv2d(2 * in_channels, channels, 1, bias=False),
            nn.GroupNorm(groups, channels),
            nn.LeakyReLU(0.2),
        )

    def forward(self, features: Tensor, neighbours: Tensor) -> Tensor:  # type: ignore[override]
        """Features (B, N, in_channels), neighbours j (B, N, k) -> (B, N, channels)."""
        layers: Any = self
        conv, norm, activation = layers
        (batch, points, _), k = features.shape, neighbours.shape[-1]
        of_neighbour, of_centre = conv.weight.flatten(1).chunk(2, dim=1)
        a = features @ of_neighbour.T
        b = features @ (of_centre - of_neighbour).T

        first = points * torch.arange(batch, device=features.device)
        edges = (neighbours + first[:, None, None]).flatten(0, 1)
        sign = torch.where(norm.weight < 0, -1.0, 1.0)
        table = (sign * a).flatten(0, 1)
        largest = sign * F.embedding_bag(edges, table, mode="max").view_as(a)
        total = sign * F.embedding_bag(edges, table, mode="sum").view_as(a)
        used = a.new_zeros(batch * points).index_add(0, edges.flatten(), a.new_ones(edges.numel()))

        # mean and variance of all a_j + b_i of a group of channels, by sums over points
        def mean(x: Tensor) -> Tensor:
            groups = x.sum(dim=1).unflatten(-1, (norm.num_groups, -1)).mean(dim=-1)
            each = groups.repeat_interleave(x.shape[-1] // norm.num_groups, dim=-1)
            return each[:, None] / (k * points)

        mean_a, mean_b = mean(total), mean(k * b)
        a, b, largest, total = a - mean_a, b - mean_b, largest - mean_a, total - k * mean_a
        squares = used.view(batch, points, 1) * a.square() + 2 * b * total + k * b.square()
        normalised = (largest + b) * (mean(squares) + norm.eps).rsqrt()
        return activation(normalised * norm.weight + norm.bias)


class Encoder(nn.Module):
    """From a cloud and its view to the image that the backbone takes.

    Args:
        obj_size: Side of the square that holds the points, in pixels, even.
        img_size: Side of the image; the square is in its middle.
        local_size: k, the points of each neighbourhood.
        trans_dim, graph_dim: Widths of the features of points, before and after the graph.
    """

    def __init__(
        self, obj_size: int, img_size: int, local_size: int, trans_dim: int, graph_dim: int
    ) -> None:
        super().__init__()
        self.obj_size, self.img_size, self.local_size = obj_size, img_size, local_size
        self.input_trans = nn.Conv1d(3, trans_dim, 1)
        self.graph_layer = EdgeConv(trans_dim, graph_dim)
        self.proj_layer = nn.Conv1d(graph_dim, graph_dim, 1)
        self.img_block = nn.Sequential(
            BasicBlock(graph_dim, graph_dim), nn.Conv2d(graph_dim, graph_dim, 1)
        )
        self.img_layer = nn.Conv2d(graph_dim, 3, 1)

    def point_features(self, cloud: Tensor) -> Tensor:
        """Return what colours the points: (B, N, 3) -> (B, N, graph_dim)."""
        features = self.input_trans(cloud.mT).mT
        features = self.graph_layer(features, nearest(cloud, self.local_size))
        return self.proj_layer(features.mT).mT

    def image(self, features: Tensor, rotated: Tensor) -> Tensor:
        """Return the normalised image of a view from its points' features (B, N, graph_dim)."""
        maps = splat(features, centre_pixels(rotated, self.obj_size), self.obj_size)
        maps = F.pad(maps, [(self.img_size - self.obj_size) // 2] * 4)
        image = self.img_layer(self.img_block(maps)).sigmoid()
        mean, std = (
            image.new_tensor(values).view(3, 1, 1)
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        return (image - mean) / std


class MlpHead(nn.Module):
    """Two hidden layers, the head of the published HorNet-L."""

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (512, 256):
            layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU()]
            layers += [nn.Dropout(0.5)]
            in_features = width
        self.mlp_head = nn.Sequential(*layers, nn.Linear(in_features, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_head(x)


class P2P(nn.Module):
    """A classifier of point clouds around a classifier of images.

    All weights of the encoder and of the head are trained; of the backbone those whose name
    contains `update_type`, 'norm' or 'bn'; 'all' trains all of them.

    Args:
        backbone: Name of a classifier in timm, such as 'hornet_large_gf'.
        head: 'linear', or 'mlp' for two hidden layers.
        obj_size, img_size, local_size, trans_dim, graph_dim: See `Encoder`.
        vote: Evaluate a cloud by the mean logits of its 40 test views, not each of 8 views.
        backbone_kwargs: Further arguments of the backbone.

    Raises:
        UserError: there is no such backbone, or a size does not fit.
    """

    def __init__(
        self,
        backbone: str = "hornet_large_gf",
        num_classes: int = 40,
        head: str = "linear",
        update_type: str = "norm",
        obj_size: int = 224,
        img_size: int = 224,
        local_size: int = 32,
        trans_dim: int = 8,
        graph_dim: int = 64,
        vote: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(backbone, head, update_type, obj_size, img_size, graph_dim)
        self.num_classes, self.vote = num_classes, vote
        self.enc = Encoder(obj_size, img_size, local_size, trans_dim, graph_dim)
        try:
            classifier: Any = timm.create_model(
                backbone, num_classes=num_classes, **(backbone_kwargs or {})
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"backbone {backbone} cannot be built: {error}") from None
        name = classifier.pretrained_cfg["classifier"]
        if not isinstance(name, str):
            raise UserError(f"backbone {backbone} has several classifiers: {', '.join(name)}")
        if head == "mlp":
            mlp = MlpHead(classifier.get_submodule(name).in_features, num_classes)
            classifier.set_submodule(name, mlp)
        self.base_model = classifier
        last = f"{name}.mlp_head.8" if head == "mlp" else name
        self.pretrained_cfg = {"classifier": f"base_model.{last}"}  # as in models of timm
        inner = {n: p for n, p in classifier.named_parameters() if not n.startswith(f"{name}.")}
        trained = [n for n in inner if update_type == "all" or update_type in n]
        if not trained:
            raise UserError(f"update_type {update_type} is in no name of a weight of {backbone}")
        for parameter_name in inner.keys() - trained:
            inner[parameter_name].requires_grad_(False)

    def forward(self, clouds: Tensor) -> Tensor:
        """Return logits.

        Args:
            clouds: (B, 2, N, 3), each cloud and its view -> (B, classes). Or (B, N, 3): each cloud
                is seen from several sides, see `vote` -> (B, classes) or (B * views, classes).
        """
        if clouds.ndim == 4:
            return self.classify(*clouds.unbind(1))
        features = self.point_features(clouds)
        views = (test_views() if self.vote else validation_views()).to(clouds)
        logits = torch.stack([self._of_view(features, rotate(clouds, view)) for view in views], 1)
        return logits.mean(dim=1) if self.vote else logits.flatten(0, 1)

    def classify(self, cloud: Tensor, rotated: Tensor) -> Tensor:
        """Return logits (B, classes) of one view of each cloud.

        Args:
            cloud: As it is stored, (B, N, 3): decides the colours.
            rotated: The same points, turned into the view: decides the pixels.
        """
        return self._of_view(self.point_features(cloud), rotated)

    def point_features(self, cloud: Tensor) -> Tensor:
        """Return the features of points, which do not depend on the view: (B, N, graph_dim)."""
        device = "cpu" if cloud.is_meta else cloud.device.type
        with torch.autocast(device, enabled=False):  # neighbours need float32
            return self.enc.point_features(cloud)

    def _of_view(self, features: Tensor, rotated: Tensor) -> Tensor:
        return self.base_model(self.enc.image(features, rotated))

    def released_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename weights of a released Swin: timm has moved its downsampling and head since."""
        if not isinstance(self.base_model, swin_transformer.SwinTransformer):
            return weights
        prefix = "base_model."
        inner = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        inner = swin_transformer.checkpoint_filter_fn(inner, self.base_model)
        outer = {n: w for n, w in weights.items() if not n.startswith(prefix)}
        return outer | {prefix + name: weight for name, weight in inner.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.base_model.set_grad_checkpointing(enable)  # type: ignore[operator]

    def example_input(self) -> Tensor:
        """Return a cloud of 1024 points and its view, to count multiply-adds with."""
        return torch.zeros(1, 2, max(1024, self.enc.local_size), 3)


def _check(
    backbone: str, head: str, update_type: str, obj_size: int, img_size: int, graph_dim: int
) -> None:
    if not timm.is_model(backbone):
        raise UserError(
            f"backbone {backbone}: timm has none{near_names(backbone, timm.list_models())}"
        )
    for name, value, kind in (("head", head, Head), ("update_type", update_type, UpdateType)):
        if value not in get_args(kind):
            raise UserError(f"{name} {value}: give one of {', '.join(get_args(kind))}")
    if obj_size % 2 or not 4 <= obj_size <= img_size or (img_size - obj_size) % 2:
        raise UserError(
            f"obj_size {obj_size}: give an even number from 4 to the size of the image, which is "
            f"{img_size} and has to be even, too"
        )
    if graph_dim % 4:
        raise UserError(f"graph_dim {graph_dim}: give a multiple of 4, the groups of its norm")


@register_model
def p2p(pretrained: bool = False, **kwargs: Any) -> P2P:
    """timm's entry; the backbone's start weights are given by --finetune."""
    if pretrained:
        raise UserError("p2p has no published weights")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return P2P(**kwargs)
