"""The HorNet family. Importing it registers the models with timm, and does nothing else."""

from .block import Block
from .checkpoints import checkpoint_filter_fn, download, fit_head
from .global_filter import GlobalLocalFilter, set_global_filter_impl
from .gnconv import GnConv, gnconv
from .hornet import HorNet
from .variants import ENTRYPOINTS, download_published

__all__ = [
    "Block",
    "GlobalLocalFilter",
    "GnConv",
    "HorNet",
    "checkpoint_filter_fn",
    "download",
    "download_published",
    "fit_head",
    "gnconv",
    "set_global_filter_impl",
]
globals().update(ENTRYPOINTS)
__all__ += list(ENTRYPOINTS)
