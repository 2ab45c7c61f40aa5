"""The gnConv of the release's decoders, registered by its name for necks and heads."""

from typing import Any

from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from models import GlobalLocalFilter, GnConv
from runtime.errors import UserError


@MODELS.register_module()  # mmdet's and mmseg's registries look in mmengine's, too
class GNConvModule(GnConv):
    """GnConv, norm, activation, with the arguments and parameter names of the release.

    Maps (B, in_channels, H, W) -> (B, out_channels, H, W); (B, dim_ratio * out_channels, H, W)
    without proj_out. The norm is named as in mmcv's ConvModule: `bn`, or `gn` for GN.

    Args:
        kernel_size: Kernel of the depthwise convolution, odd.
        dim_ratio, proj_out, order: Those of GnConv.
        norm_cfg, act_cfg: Those of mmcv's ConvModule; None leaves the layer out.
        inplace: Let the activation overwrite its input, if it can.
        type: 'gnconv' for the depthwise convolution, 'gngf' for a GlobalLocalFilter instead.
        h, w: Size of the global filter; w is h // 2 + 1 by default.
        gf_kernel_size: Kernel of the convolution beside the global filter, odd.
        global_filter: (h, w), and type 'gngf', for configs, in which `type` names the class.

    Raises:
        ValueError: an unknown type, an argument of a wrong type, or what GnConv refuses.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        dim_ratio: int = 1,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = {"type": "ReLU"},  # noqa: B006 - never changed
        inplace: bool = False,
        proj_out: bool = False,
        order: int = 2,
        type: str = "gnconv",
        h: int = 32,
        w: int | None = None,
        gf_kernel_size: int = 3,
        global_filter: tuple[int, int] | None = None,
    ) -> None:
        if type not in ("gnconv", "gngf"):
            raise ValueError(f"a GNConvModule has no type {type!r}: choose gnconv or gngf")
        if not isinstance(proj_out, bool):
            raise ValueError(f"proj_out of a GNConvModule is True or False, not {proj_out!r}")
        if global_filter is not None:
            type, (h, w) = "gngf", global_filter
        _check_sizes(kernel_size=kernel_size, dim_ratio=dim_ratio, order=order, h=h,
                     w=1 if w is None else w, gf_kernel_size=gf_kernel_size)  # fmt: skip
        size = h, h // 2 + 1 if w is None else w

        def mixer(channels: int) -> nn.Module:
            return GlobalLocalFilter(channels, *size, kernel_size=gf_kernel_size)

        super().__init__(in_channels, out_channels, order, kernel_size, dim_ratio=dim_ratio,
                         proj_out=proj_out, mixer=mixer if type == "gngf" else None)  # fmt: skip
        self.norm_name = ""
        if norm_cfg is not None:
            width = out_channels if proj_out else self.dims[-1]
            self.norm_name, norm = build_norm_layer(norm_cfg, width)
            self.add_module(self.norm_name, norm)
        self.activate = nn.Identity() if act_cfg is None else build_activation_layer(act_cfg)
        if inplace and hasattr(self.activate, "inplace"):
            self.activate.inplace = True

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.norm_name:
            x = self.get_submodule(self.norm_name)(x)
        return self.activate(x)


def from_release(
    owner: str,
    config: Any,
    own: tuple[Any, ...],
    in_channels: int,
    out_channels: int,
    defaults: dict[str, Any],
    **layers: Any,
) -> GNConvModule:
    """Return the layer of a release's config: a dict of arguments of GNConvModule.

    `own` are the order, kernel_size and global_filter beside the config, `layers` the norm_cfg and
    act_cfg. Raises UserError, which names the owner, if the config is wrong, the output is not
    out_channels wide, or an own argument was given, too.
    """
    try:
        if own != (2, 7, None):
            raise ValueError("order, kernel_size and global_filter belong in this dict")
        layer = GNConvModule(in_channels, out_channels, **layers, **{**defaults, **config})
        if isinstance(layer.proj_out, nn.Identity) and layer.dims[-1] != out_channels:
            raise ValueError(f"{layer.dims[-1]} channels for {out_channels}: give proj_out=True")
    except (TypeError, ValueError) as error:
        raise UserError(f"{owner}: {error}") from None
    return layer


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{name} of a GNConvModule is a whole number, not {size!r}")
