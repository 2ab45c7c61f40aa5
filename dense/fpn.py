"""HorFPN for mmdet: a feature pyramid whose output convolutions are gnConvs (HorNet, 3.3)."""

from typing import Any

from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from torch import Tensor, nn

from models import GnConv


@MODELS.register_module(name=["GNFPN", "HorFPN"])
class HorFPN(FPN):
    """mmdet's FPN with a gnConv, without norm or activation, in place of each 3x3 convolution.

    Args:
        order: Order of the gnConvs.
        kernel_size: Kernel of their depthwise convolutions.
        global_filter: (h, w) of their global filters instead; resized to the maps at hand.
        kwargs: As mmdet's FPN; further levels are max-pooled, as the released ones were.

    Raises:
        ValueError: further levels are asked for as convolutions.
    """

    def __init__(
        self,
        *args: Any,
        order: int = 2,
        kernel_size: int = 7,
        global_filter: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.add_extra_convs:
            raise ValueError("HorFPN pools its further levels: leave add_extra_convs out")
        self.fpn_convs = nn.ModuleList(
            GnConv(
                self.out_channels,
                order=order,
                kernel_size=kernel_size,
                global_filter=global_filter,
            )
            for _ in self.lateral_convs
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps of the backbone -> maps of out_channels each, contiguous as RoIAlign wants them."""
        return tuple(level.contiguous() for level in super().forward(inputs))
