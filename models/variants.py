"""The variants of HorNet, and their registration with timm on import."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.models
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .hornet import HorNet, HorNetFeatures
from .pretrained import (
    cache_file,
    checkpoint_filter_fn,
    download,
    is_imagenet22k,
    read_weights,
    select_imagenet1k,
)

logger = logging.getLogger(__name__)

# (h, w) of the global filters per stage, for images of 224 and 384 pixels: the height of the
# stage's feature map, and half its width, rounded down, plus one
GF_224 = (None, None, (14, 8), (7, 4))
GF_384 = (None, None, (24, 13), (12, 7))


@dataclass(frozen=True)
class Variant:
    """Arguments of HorNet, and metadata; all have orders 2, 3, 4, 5 and s = 1/3."""

    base_dim: int
    depths: tuple[int, ...]
    global_filters: tuple[tuple[int, int] | None, ...] | None = None
    image_size: int = 224
    released: bool = True
    """Whether it is one of the paper's; the others are this project's."""
    weights: tuple[str, str] | None = None
    """The released weights: tag, and identifier in their URL."""


RELEASED = (2, 3, 18, 2)
IMAGENET_1K = 1000
# rows of the released ImageNet-22K heads; the index of the 1K classes ends at 10,458, and the
# published sizes (209, 211, 216 million) allow 100 more. With pretrained weights the file decides.
IMAGENET_22K = 10_459
_ADDRESS = "https://cloud.tsinghua.edu.cn/f/{}/?dl=1"
_MMPRETRAIN = "https://download.openmmlab.com/mmclassification/v0/hornet/"
MMPRETRAIN_FILES = {
    "hornet_tiny_7x7": "hornet-tiny_3rdparty_in1k_20220915-0e8eedff.pth",
    "hornet_tiny_gf": "hornet-tiny-gf_3rdparty_in1k_20220915-4c35a66b.pth",
    "hornet_small_7x7": "hornet-small_3rdparty_in1k_20220915-5935f60f.pth",
    "hornet_small_gf": "hornet-small-gf_3rdparty_in1k_20220915-649ca492.pth",
    "hornet_base_7x7": "hornet-base_3rdparty_in1k_20220915-a06176bb.pth",
    "hornet_base_gf": "hornet-base-gf_3rdparty_in1k_20220915-82c06fa7.pth",
}
"""The same weights as OpenMMLab publishes them; the names end in 8 digits of the SHA-256."""

VARIANTS: dict[str, Variant] = {
    # this project's: the depths of timm's ConvNeXt of these names, and widths for about as many
    # parameters (3.4, 5.2, 9.8 and 14.3 million with 7x7 convolutions)
    "hornet_atto_7x7": Variant(32, (2, 2, 6, 2), released=False),
    "hornet_atto_gf": Variant(32, (2, 2, 6, 2), GF_224, released=False),
    "hornet_femto_7x7": Variant(40, (2, 2, 6, 2), released=False),
    "hornet_femto_gf": Variant(40, (2, 2, 6, 2), GF_224, released=False),
    "hornet_pico_7x7": Variant(56, (2, 2, 6, 2), released=False),
    "hornet_pico_gf": Variant(56, (2, 2, 6, 2), GF_224, released=False),
    "hornet_nano_7x7": Variant(64, (2, 2, 8, 2), released=False),
    "hornet_nano_gf": Variant(64, (2, 2, 8, 2), GF_224, released=False),
    # the paper's
    "hornet_tiny_7x7": Variant(64, RELEASED, weights=("in1k", "bac9690c72944d19aca1")),
    "hornet_tiny_gf": Variant(64, RELEASED, GF_224, weights=("in1k", "460e759c82324ea6bfa3")),
    "hornet_small_7x7": Variant(96, RELEASED, weights=("in1k", "8ef64277da0e469ea857")),
    "hornet_small_gf": Variant(96, RELEASED, GF_224, weights=("in1k", "959603ca287d4c09ad49")),
    "hornet_base_7x7": Variant(128, RELEASED, weights=("in1k", "13a748487711492e9704")),
    "hornet_base_gf": Variant(128, RELEASED, GF_224, weights=("in1k", "c212d1d8a3914b47a5c1")),
    "hornet_base_gf_img384": Variant(128, RELEASED, GF_384, image_size=384),
    "hornet_large_7x7": Variant(192, RELEASED, weights=("in22k", "c2fc23caae084a3aa73d")),
    "hornet_large_gf": Variant(192, RELEASED, GF_224, weights=("in22k", "8600206ebdfa485f98d0")),
    "hornet_large_gf_img384": Variant(
        192, RELEASED, GF_384, image_size=384, weights=("in22k", "eec48d5eca5a48d98fd2")
    ),
}


def _cfgs(name: str, variant: Variant) -> dict[str, dict[str, Any]]:
    """Return timm's pretrained_cfg by 'name.tag', or by 'name' without weights."""
    side = variant.image_size
    cfg: dict[str, Any] = {
        "num_classes": IMAGENET_1K,
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
        cfg.update(description="A small HorNet of this project, without released weights")
    if not variant.weights:
        return {name: cfg}
    tag, share = variant.weights
    cfg["url"] = _ADDRESS.format(share)
    if tag == "in22k":
        cfg["num_classes"] = IMAGENET_22K
    return {f"{name}.{tag}": cfg}


default_cfgs = timm.models.generate_default_cfgs(
    {key: cfg for name, row in VARIANTS.items() for key, cfg in _cfgs(name, row).items()}
)


def download_published(name: str) -> Path | None:
    """`download` the released weights of 'name' or 'name.tag'; None if there are none.

    If the release's address fails, those of ImageNet-1K are fetched from OpenMMLab.
    """
    model, _, tag = name.partition(".")
    variant = VARIANTS.get(model)
    if variant is None or variant.weights is None or tag not in ("", variant.weights[0]):
        return None
    tag, share = variant.weights
    own, other = f"{model}.{tag}.pth", MMPRETRAIN_FILES.get(model, "")
    failed = ""
    try:
        if cache_file(own).exists() or not (other and cache_file(other).exists()):
            return download(_ADDRESS.format(share), own)
    except RuntimeError as error:
        if not other:
            raise
        failed = f"{error}; "
        logger.warning("%strying %s", failed, _MMPRETRAIN + other)
    digest = Path(other).stem.rpartition("-")[2]
    try:
        return download(_MMPRETRAIN + other, other, digest)
    except RuntimeError as error:
        raise RuntimeError(f"{failed}{error}") from None


def _pretrained(
    name: str, pretrained_cfg: Any, overlay: dict[str, Any], num_classes: int | None
) -> dict[str, Any]:
    """Return the changes to pretrained_cfg with which timm loads weights from a URL.

    timm can't download or read the released files by itself. Empty if the weights have another
    source: a file, a state dict, a Hugging Face repository.
    """
    cfg = timm.models.resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    if cfg.source or cfg.file or cfg.state_dict or cfg.hf_hub_id or not cfg.url:
        return {}
    published = None if "url" in overlay else download_published(f"{name}.{cfg.tag}")
    weights = read_weights(published or download(str(cfg.url)))
    rows = len(weights["head.weight"])
    if num_classes == IMAGENET_1K and is_imagenet22k(rows):
        weights, rows = select_imagenet1k(weights), IMAGENET_1K
    return {"state_dict": weights, "num_classes": rows}


def _register(name: str, variant: Variant) -> Callable[..., HorNet]:
    """Register a function of this name; timm looks for `default_cfgs` in its module."""
    arguments = {key: getattr(variant, key) for key in ("base_dim", "depths", "global_filters")}

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> HorNet:
        overlay = dict(pretrained_cfg_overlay or {})
        if pretrained:
            overlay |= _pretrained(name, pretrained_cfg, overlay, kwargs.get("num_classes"))
        elif not pretrained_cfg:
            # without weights, whose class count would be the default
            kwargs.setdefault("num_classes", IMAGENET_1K)
        model = timm.models.build_model_with_cfg(
            HorNet,
            name,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": HorNetFeatures},
            **(arguments | kwargs),
        )
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        cfg.pop("state_dict", None)  # loaded; don't keep it twice
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: base width {variant.base_dim}, depths {variant.depths}."
    return timm.models.register_model(create)


ENTRYPOINTS = {name: _register(name, variant) for name, variant in VARIANTS.items()}
globals().update(ENTRYPOINTS)
