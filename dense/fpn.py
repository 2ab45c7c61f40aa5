"""HorFPN for mmdet: a feature pyramid whose output convolutions are gnConvs (section 3.3)."""

from typing import Any

from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from torch import Tensor, nn

from models import GnConv


@MODELS.register_module(name=["GNFPN", "HorFPN"])
class HorFPN(FPN):
    """mmdet's FPN with gnConvs, without norm or activation, in place of the 3x3 convolutions.

    The first three arguments are GnConv's; all others are FPN's. Extra levels are max-pooled, as
    in the release; ValueError if `add_extra_convs` is given.
    """

    def __init__(
        self, order: int = 2, kernel_size: int = 7, global_filter: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if self.add_extra_convs:
            raise ValueError("HorFPN pools its extra levels: leave add_extra_convs out")
        self.fpn_convs = nn.ModuleList(
            GnConv(self.out_channels, None, order, kernel_size, global_filter=global_filter)
            for _ in self.lateral_convs
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the levels, contiguous for mmcv's RoIAlign."""
        return tuple(level.contiguous() for level in super().forward(inputs))
