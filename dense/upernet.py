"""HorFPN's counterpart for mmseg: UPerNet whose final fusion is a gnConv."""

from typing import Any

from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS

from dense.gnconv import GNConvModule, from_release
from runtime.errors import UserError


@MODELS.register_module()
class GNUPerHead(UPerHead):
    """mmseg's UPerHead with a gnConv, norm and activation in place of the final 3x3 convolution.

    Maps (B, in_channels[i], H_i, W_i) -> logits (B, num_classes, H_0, W_0).

    Args:
        order, kernel_size, global_filter: Those of GnConv.
        gn_conv_cfg: The release's form instead: arguments of GNConvModule, such as
            dict(type="gngf", order=3, proj_out=True); kernel_size is 3 by default. UserError if it
            is wrong.
        conv_cfg: The release's name of gn_conv_cfg; other convolutions of the head don't take it.
        kwargs: All other arguments are UPerHead's.
    """

    def __init__(
        self,
        order: int = 2,
        kernel_size: int = 7,
        global_filter: Any = None,
        gn_conv_cfg: dict[str, Any] | None = None,
        conv_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if gn_conv_cfg is not None and conv_cfg is not None:
            raise UserError("GNUPerHead: gn_conv_cfg and conv_cfg are the same: give one of them")
        config = conv_cfg if gn_conv_cfg is None else gn_conv_cfg
        widths = len(self.in_channels) * self.channels, self.channels
        layers = {"norm_cfg": self.norm_cfg, "act_cfg": self.act_cfg}
        own = order, kernel_size, global_filter
        if config is None:
            self.fpn_bottleneck = GNConvModule(
                *widths, kernel_size, order=order, global_filter=global_filter, proj_out=True,
                **layers,
            )  # fmt: skip
        else:
            self.fpn_bottleneck = from_release(
                "conv_cfg of GNUPerHead", config, own, *widths, {"kernel_size": 3}, **layers
            )
