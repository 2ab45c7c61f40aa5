"""HorFPN's counterpart for mmseg: UPerNet whose final fusion is a gnConv."""

from typing import Any

from mmcv.cnn import build_activation_layer, build_norm_layer
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS
from torch import Tensor

from models import GnConv


class GnConvModule(GnConv):
    """GnConv, norm, activation; further arguments are GnConv's."""

    def __init__(
        self, in_channels: int, out_channels: int, norm_cfg: Any, act_cfg: Any, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.bn = build_norm_layer(norm_cfg, out_channels)[1]
        self.activate = build_activation_layer(act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(super().forward(x)))


@MODELS.register_module()
class GNUPerHead(UPerHead):
    """mmseg's UPerHead with a gnConv in place of the final 3x3 convolution.

    The first three arguments are GnConv's; all others are UPerHead's.
    """

    def __init__(
        self, order: int = 2, kernel_size: int = 7, global_filter: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        widths = len(self.in_channels) * self.channels, self.channels
        options = {"order": order, "kernel_size": kernel_size, "global_filter": global_filter}
        self.fpn_bottleneck = GnConvModule(*widths, self.norm_cfg, self.act_cfg, **options)
