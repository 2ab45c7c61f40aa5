"""Parameters and multiply-adds of detectors and segmentors, counted as in the published tables.

1000 proposals pass through each box head and 100 through each mask head; auxiliary heads, used only
in training, are left out.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from runtime.errors import UserError
from utils import count_parameters, gmacs_of

COLUMNS = "{:24} {:>24} {:>13} {:>9}\n"


def table(config: Any, size: tuple[int, int] | None = None) -> str:
    """Return a line per part: its input, parameters and giga multiply-adds; then the sum.

    `size` is (height, width) of the image; by default that of the published tables, 800 x 1280 for
    detectors, and the crop's side by four times that for segmentors. Raises UserError for models
    that are neither segmentors nor of the R-CNN family.
    """
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(config.default_scope)
    if size is None and config.default_scope == "mmseg":
        side = config.model.data_preprocessor.size[0]
        size = (side, 4 * side)
    height, width = size or (800, 1280)
    # built on the CPU: Swin computes its drop path rates by tensors
    model: Any = MODELS.build(config.model).to("meta")
    text = COLUMNS.format("part", "input", "parameters", "GMACs")
    rest, total = count_parameters(model), 0.0
    for name, module, given in _parts(model, torch.empty(1, 3, height, width, device="meta")):
        count = count_parameters(module)
        gmacs = sum(gmacs_of(module, given)[""])
        first, more = (given, "") if torch.is_tensor(given) else (given[0], ", ...")
        shape = " x ".join(map(str, first.shape)) + more
        text += COLUMNS.format(name, shape, f"{count:,}", f"{gmacs:.1f}")
        rest, total = rest - count, total + gmacs
    if rest:
        text += COLUMNS.format("only for training", "", f"{rest:,}", "")
    pixels = f"{width} x {height} pixels"
    return text + COLUMNS.format("all", pixels, f"{count_parameters(model):,}", f"{total:.1f}")


def _parts(model: Any, maps: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield the parts that run for one image, each with its name and its input."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    for name, part in model.named_children():
        if name in ("backbone", "neck"):
            yield name, part, maps
            maps = part(maps)
    if isinstance(getattr(model, "decode_head", None), BaseDecodeHead):
        yield "decode_head", model.decode_head, maps
        return
    if not (hasattr(model, "rpn_head") and hasattr(model, "roi_head")):
        raise UserError(
            f"a {type(model).__name__} cannot be counted: give a segmentor, or a detector with "
            "proposals and heads for them"
        )
    yield "rpn_head", model.rpn_head, maps
    for name, head in model.roi_head.named_modules():
        found = re.fullmatch(r"(bbox|mask)_head(\.\d+)?", name)  # a number in a cascade
        if found and not isinstance(head, nn.ModuleList):
            extractor = model.roi_head.get_submodule(name.replace("_head", "_roi_extractor"))
            shape = extractor.out_channels, *extractor.roi_layers[0].output_size
            count = 1000 if found[1] == "bbox" else 100
            yield f"roi_head.{name}", head, torch.empty(count, *shape, device="meta")
