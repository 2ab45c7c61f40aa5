"""The HorNet family. Importing it registers the models with timm, and does nothing else."""

from .fast.accelerate import accelerate, plain
from .gnconv import GlobalLocalFilter, GnConv, gnconv, set_global_filter_impl
from .hornet import Block, HorNet
from .pretrained import checkpoint_filter_fn, download
from .variants import ENTRYPOINTS, download_published

__all__ = [
    "Block",
    "GlobalLocalFilter",
    "GnConv",
    "HorNet",
    "accelerate",
    "checkpoint_filter_fn",
    "download",
    "download_published",
    "gnconv",
    "plain",
    "set_global_filter_impl",
]
globals().update(ENTRYPOINTS)
__all__ += list(ENTRYPOINTS)
