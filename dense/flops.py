"""Parameters and multiply-adds of detectors and segmentors, as the published tables count them.

1000 proposals go through each box head and 100 through each mask head; an auxiliary head, which
only training needs, is left out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from utils import count_parameters, gmacs_of

PROPOSALS, MASKS = 1000, 100


def default_size(config: Any) -> tuple[int, int]:
    """(height, width) of the published figures: 800 x 1280, or one crop by four."""
    if config.default_scope == "mmdet":
        return 800, 1280
    side = config.model.data_preprocessor.size[0]
    return side, 4 * side


def table(config: Any, size: tuple[int, int] | None = None) -> str:
    """A line a part: what it is given, its parameters, its giga multiply-adds; the sum below.

    Args:
        config: Of mmdet or mmseg, with a HorNet or another backbone.
        size: (height, width) of the image.

    Raises:
        UserError: the model is neither a segmentor nor of the R-CNN family.
    """
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(config.default_scope)
    size = size or default_size(config)
    with torch.device("meta"):
        model: Any = MODELS.build(config.model)
    columns = "{:24} {:>24} {:>13} {:>9}\n"
    text = columns.format("part", "given", "parameters", "GMACs")
    parameters, total = 0, 0.0
    for name, module, given in _parts(model, size):
        count = count_parameters(module)
        gmacs = sum(gmacs_of(module, given)[""])
        first = given if torch.is_tensor(given) else given[0]
        shape = " x ".join(map(str, first.shape)) + ("" if torch.is_tensor(given) else ", ...")
        text += columns.format(name, shape, f"{count:,}", f"{gmacs:.1f}")
        parameters, total = parameters + count, total + gmacs
    rest = count_parameters(model) - parameters
    if rest:
        text += columns.format("only for training", "", f"{rest:,}", "")
    size_text = f"{size[1]} x {size[0]} pixels"
    return text + columns.format("all", size_text, f"{rest + parameters:,}", f"{total:.1f}")


def _parts(model: Any, size: tuple[int, int]) -> Iterator[tuple[str, nn.Module, Any]]:
    """The parts that run for one image, each with what it is given."""
    image = torch.empty(1, 3, *size, device="meta")
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    yield "backbone", model.backbone, image
    maps: tuple[Tensor, ...] = model.backbone(image)
    if hasattr(model, "neck"):
        yield "neck", model.neck, maps
        maps = model.neck(maps)
    if hasattr(model, "rpn_head") and hasattr(model, "roi_head"):
        yield "rpn_head", model.rpn_head, maps
        for name, count in (("bbox_head", PROPOSALS), ("mask_head", MASKS)):
            heads = getattr(model.roi_head, name, None)
            if heads is None:
                continue
            extractor = getattr(model.roi_head, name.replace("head", "roi_extractor"))
            several = isinstance(heads, nn.ModuleList)
            for index, head in enumerate(heads if several else [heads]):
                layer = extractor[index] if several else extractor
                side = layer.roi_layers[0].output_size[0]
                regions = torch.empty(count, layer.out_channels, side, side, device="meta")
                yield f"roi_head.{name}" + (f".{index}" if several else ""), head, regions
    elif isinstance(getattr(model, "decode_head", None), BaseDecodeHead):
        yield "decode_head", model.decode_head, maps
    else:
        raise UserError(
            f"a {type(model).__name__} cannot be counted: give a segmentor, or a detector with "
            "proposals and heads for them"
        )
