"""The block of a HorNet, and a stage of them (HorNet, figure 2).

Shapes: (B, C, H, W) in and out, logically channels first; in memory channels last from the first
norm on, which runs over the last axis of that layout.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .gnconv import GnConv

NORM_EPS = 1e-6


class PointwiseLinear(nn.Linear):
    """nn.Linear over the channels of (B, C, H, W), computed as a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Block(nn.Module):
    """x + gamma1 * GnConv(norm(x)), then x + gamma2 * MLP(norm(x)) (figure 2 of the paper).

    Input and output: (B, dim, H, W).

    Args:
        dim: Number of channels.
        order: Order of the GnConv.
        kernel_size: Kernel of its depthwise convolution.
        scale: Scale s of its depthwise output.
        global_filter: (h, w) of its global filter, or None for the depthwise convolution.
        global_filter_impl: 'fft' or 'matmul'.
        mlp_ratio: Hidden width of the MLP as a multiple of dim.
        drop_path: Probability of dropping each of the two branches, per sample.
        layer_scale_init_value: Initial gamma1 and gamma2; None or 0 leaves them out.

    Raises:
        ValueError: as GnConv.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(
        self,
        dim: int,
        order: int,
        kernel_size: int = 7,
        scale: float = 1 / 3,
        global_filter: tuple[int, int] | None = None,
        global_filter_impl: str = "fft",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = int(mlp_ratio * dim)
        self.layer_scale_init_value = layer_scale_init_value or 0.0
        for name in ("gamma1", "gamma2"):
            gamma = nn.Parameter(torch.empty(dim, **factory)) if layer_scale_init_value else None
            self.register_parameter(name, gamma)
        self.reset_layer_scale()
        self.norm1 = LayerNorm2d(dim, eps=NORM_EPS, **factory)
        self.gnconv = GnConv(
            dim,
            order=order,
            kernel_size=kernel_size,
            scale=scale,
            global_filter=global_filter,
            global_filter_impl=global_filter_impl,
            **factory,
        )
        self.norm2 = LayerNorm2d(dim, eps=NORM_EPS, **factory)
        self.pwconv1 = PointwiseLinear(dim, hidden, **factory)
        self.act = nn.GELU()
        self.pwconv2 = PointwiseLinear(hidden, dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @torch.jit.ignore
    def reset_layer_scale(self) -> None:
        """Set gamma1 and gamma2 to layer_scale_init_value."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None:
                nn.init.constant_(gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        gamma1, gamma2 = self.gamma1, self.gamma2
        y = self.gnconv(self.norm1(x))
        if gamma1 is not None:
            y = y * gamma1[:, None, None]
        x = x + self.drop_path(y)
        y = self.pwconv2(self.act(self.pwconv1(self.norm2(x))))
        if gamma2 is not None:
            y = y * gamma2[:, None, None]
        return x + self.drop_path(y)


class Stage(nn.Sequential):
    """Blocks in a row; recomputed in the backward pass if grad_checkpointing is set."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        for block in self:
            x = block(x)
        return x
