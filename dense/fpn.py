"""HorFPN for mmdet: a feature pyramid whose output convolutions are gnConvs (section 3.3)."""

from functools import partial
from typing import Any

from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from torch import Tensor, nn

from dense.gnconv import from_release
from models import GnConv


@MODELS.register_module(name=["GNFPN", "HorFPN"])
class HorFPN(FPN):
    """mmdet's FPN with gnConvs in place of the 3x3 convolutions.

    Maps (B, in_channels[i], H_i, W_i) -> num_outs maps of out_channels. Extra levels are
    max-pooled, as in the release; ValueError if `add_extra_convs` is given.

    Args:
        order, kernel_size, global_filter: Those of GnConv, without norm or activation.
        gn_conv_cfg: The release's form instead: arguments of GNConvModule, such as
            dict(type="gngf", order=3, proj_out=True); w is 17 by default. The norm and activation
            are FPN's, by norm_cfg and act_cfg. UserError if it is wrong.
        kwargs: All other arguments are FPN's.
    """

    def __init__(
        self,
        order: int = 2,
        kernel_size: int = 7,
        global_filter: Any = None,
        gn_conv_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.add_extra_convs:
            raise ValueError("HorFPN pools its extra levels: leave add_extra_convs out")
        width = self.out_channels
        own = order, kernel_size, global_filter
        layer: Any = partial(GnConv, width, None, order, kernel_size, global_filter=global_filter)
        if gn_conv_cfg is not None:
            layer = partial(from_release, "gn_conv_cfg of HorFPN", gn_conv_cfg, own, width, width,
                            {"w": 17}, norm_cfg=kwargs.get("norm_cfg"),
                            act_cfg=kwargs.get("act_cfg"))  # fmt: skip
        self.fpn_convs = nn.ModuleList(layer() for _ in self.lateral_convs)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the levels, contiguous for mmcv's RoIAlign."""
        return tuple(level.contiguous() for level in super().forward(inputs))
