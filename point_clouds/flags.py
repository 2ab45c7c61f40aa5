"""The flags of point clouds, beside those of main.py (config/flags.py)."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from config.command_line import parse_args_with
from config.flags import Config, ModelConfig, Positive
from runtime.errors import UserError

Head = Literal["linear", "mlp"]
UpdateType = Literal["norm", "bn", "all"]


@dataclass(frozen=True)
class PointConfig:
    """Point clouds"""

    backbone: str = "hornet_large_gf"
    """Image classifier that reads the images of clouds, by its name in timm."""
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the backbone, as in '{"base_dim": 32}'."""
    head: Head = "linear"
    """Classifier on the features of the backbone; mlp: with two hidden layers."""
    update_type: UpdateType = "norm"
    """What is trained of the backbone: weights whose names contain norm or bn, or all of them."""
    obj_size: Positive = 224
    """Side of the square of pixels that a cloud fills, even; the image is input_size wide."""
    local_size: Positive = 32
    """Points of each neighbourhood, the point itself included."""
    trans_dim: Positive = 8
    """Width of the features of points before the graph convolution."""
    graph_dim: Positive = 64
    """Width of the features of points and pixels, a multiple of 4."""
    num_points: Positive = 4096
    """Points per cloud, chosen by farthest point sampling; smaller clouds are repeated."""
    up_axis: Literal["y", "z"] = "y"
    """Axis that points upwards in the files."""
    unit_sphere: bool = True
    """Move the mean of each cloud to the origin, and scale it to fit into the unit sphere."""


@dataclass(frozen=True)
class PointCloudConfig(Config):
    """All flags of a run on point clouds."""

    points: PointConfig = field(default_factory=PointConfig)


def parse_args(argv: list[str]) -> PointCloudConfig:
    """Parse the command line; UserError for what does not fit point clouds."""
    config: PointCloudConfig = parse_args_with(argv, kind=PointCloudConfig)[0]
    without_effect = [*vars(config.augment), "drop_path", "layer_scale_init_value"]
    without_effect += ["teacher", "tta"]
    without_effect += [
        "head_init_scale",
        "eval_data_path",
        "exif_orientation",
        "background",
        *("in_chans", "value_range", "mean", "std"),
    ]
    flat, default = config.flat(), PointCloudConfig().flat()
    for name in without_effect:
        if flat[name] != default[name]:
            raise UserError(
                f"--{name} is for images and has no effect on point clouds (arguments of the image "
                "classifier are --backbone_kwargs)"
            )
    if config.mixup.enabled:
        raise UserError("point clouds cannot be mixed: give --mixup 0 --cutmix 0")
    if config.runtime.smoke:
        raise UserError("--smoke is for images: `make demo-points` trains on drawn clouds")
    if not isinstance(config.model.input_size, int):
        raise UserError("--input_size: the image of a point cloud is a square, give one number")
    points = config.points
    if points.num_points < points.local_size:
        raise UserError(
            f"--num_points {points.num_points}: fewer than the --local_size {points.local_size} "
            "points of a neighbourhood"
        )
    return replace(config, model=_model_of(config))


def _model_of(config: PointCloudConfig) -> ModelConfig:
    """Return the model that the flags describe, as timm builds it."""
    model, points = config.model, config.points
    names = ("backbone", "backbone_kwargs", "head", "update_type", "obj_size", "local_size")
    kwargs = {name: getattr(points, name) for name in (*names, "trans_dim", "graph_dim")}
    kwargs["img_size"] = model.input_size
    if model.model not in (ModelConfig.model, "p2p"):
        raise UserError(f"--model {model.model}: give the image classifier as --backbone")
    if model.model != "p2p" and model.model_kwargs:  # in the config.yaml of a run they follow
        raise UserError(
            "--model_kwargs: give arguments of the image classifier as --backbone_kwargs"
        )
    return replace(model, model="p2p", model_kwargs=kwargs)
