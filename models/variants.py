"""The variants of HorNet and their registration with timm.

Importing this module registers every row of `VARIANTS` under its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .checkpoints import checkpoint_filter_fn
from .hornet import HorNet, HorNetFeatures

__all__: list[str] = []

# (h, w) of the global filters per stage, for images of 224 and of 384 pixels: w is half the
# width of the stage's map, plus one
GF_224 = (None, None, (14, 8), (7, 4))
GF_384 = (None, None, (24, 13), (12, 7))


@dataclass(frozen=True)
class Variant:
    """One row of the table; orders 2, 3, 4, 5 and s = 1/3 are the same for all."""

    base_dim: int
    """Channels of the first stage."""
    depths: tuple[int, ...]
    """Blocks per stage."""
    global_filters: tuple[tuple[int, int] | None, ...] | None = None
    """Filter sizes per stage; None for 7x7 convolutions throughout."""
    image_size: int = 224
    """Side of the images it is made for."""
    released: bool = True
    """Whether the paper's authors released it; the others are this project's own."""


RELEASED = (2, 3, 18, 2)

VARIANTS: dict[str, Variant] = {
    # this project's own small end: depths of timm's ConvNeXt of those names, and a width that gives
    # about as many parameters (3.4, 5.2, 9.8 and 14.3 million with 7x7 convolutions)
    "hornet_atto_7x7": Variant(32, (2, 2, 6, 2), released=False),
    "hornet_atto_gf": Variant(32, (2, 2, 6, 2), GF_224, released=False),
    "hornet_femto_7x7": Variant(40, (2, 2, 6, 2), released=False),
    "hornet_femto_gf": Variant(40, (2, 2, 6, 2), GF_224, released=False),
    "hornet_pico_7x7": Variant(56, (2, 2, 6, 2), released=False),
    "hornet_pico_gf": Variant(56, (2, 2, 6, 2), GF_224, released=False),
    "hornet_nano_7x7": Variant(64, (2, 2, 8, 2), released=False),
    "hornet_nano_gf": Variant(64, (2, 2, 8, 2), GF_224, released=False),
    # the paper's
    "hornet_tiny_7x7": Variant(64, RELEASED),
    "hornet_tiny_gf": Variant(64, RELEASED, GF_224),
    "hornet_small_7x7": Variant(96, RELEASED),
    "hornet_small_gf": Variant(96, RELEASED, GF_224),
    "hornet_base_7x7": Variant(128, RELEASED),
    "hornet_base_gf": Variant(128, RELEASED, GF_224),
    "hornet_base_gf_img384": Variant(128, RELEASED, GF_384, image_size=384),
    "hornet_large_7x7": Variant(192, RELEASED),
    "hornet_large_gf": Variant(192, RELEASED, GF_224),
    "hornet_large_gf_img384": Variant(192, RELEASED, GF_384, image_size=384),
}


def _cfg(variant: Variant) -> dict[str, Any]:
    side = variant.image_size
    cfg: dict[str, Any] = {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875,  # 224 of 256
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "mit",
    }
    if side == 384:
        cfg.update(crop_pct=1.0, crop_mode="squash")
    if variant.released:
        cfg.update(
            paper_name="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated "
            "Convolutions",
            paper_ids="arXiv:2207.14284",
            origin_url="https://github.com/raoyongming/HorNet",
        )
    else:
        cfg.update(description="A small HorNet of this project's own, without released weights")
    return cfg


default_cfgs = generate_default_cfgs({name: _cfg(row) for name, row in VARIANTS.items()})


def _create_hornet(name: str, pretrained: bool = False, **kwargs: Any) -> HorNet:
    variant = VARIANTS[name]
    model_args = {
        "base_dim": variant.base_dim,
        "depths": variant.depths,
        "global_filters": variant.global_filters,
    }
    return build_model_with_cfg(
        HorNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": HorNetFeatures},
        **{**model_args, **kwargs},
    )


def _register(name: str, variant: Variant) -> Callable[..., HorNet]:
    """Give timm a function of this name; timm finds its default_cfgs in this module."""

    def create(pretrained: bool = False, **kwargs: Any) -> HorNet:
        return _create_hornet(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"{'The released' if variant.released else 'This project’s own'} {name}: "
        f"base width {variant.base_dim}, depths {variant.depths}."
    )
    return register_model(create)


ENTRYPOINTS = {name: _register(name, variant) for name, variant in VARIANTS.items()}
globals().update(ENTRYPOINTS)
