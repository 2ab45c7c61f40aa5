"""The block of a HorNet, and a stage of them (HorNet, figure 2).

Shapes: (B, C, H, W) in and out, logically channels first; in memory channels last from the first
norm on, which runs over the last axis of that layout.
"""

import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .gnconv import GnConv
from .layers import PointwiseConv, PointwiseLinear, fold_norm, fold_scale
from .lean import cheap, has_hooks
from .ops.dispatch import autocast_dtype
from .ops.recompute import lean_memory

NORM_EPS = 1e-6


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
        self.act: nn.Module = nn.GELU()
        self.pwconv2 = PointwiseLinear(hidden, dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @torch.jit.ignore
    def reset_layer_scale(self) -> None:
        """Set gamma1 and gamma2 to layer_scale_init_value."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None:
                nn.init.constant_(gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self._add(x, self.gnconv(self.norm1(x)), self.gamma1)
            x = self._add(x, self.pwconv2(self.act(self.pwconv1(self.norm2(x)))), self.gamma2)
        else:
            x = self._forward(x)
        return x

    @torch.jit.ignore
    def _forward(self, x: Tensor) -> Tensor:
        into_weights = self.training and self.scales_weights(x)
        if self._uses_triton():
            y = self._gnconv_by_triton(x)
        else:
            first = self.gnconv.proj_in if type(self.gnconv) is GnConv else self.gnconv
            y = cheap(self.norm1, x, is_operand=type(first) is PointwiseConv)
            y = self.gnconv(y, self.gamma1) if into_weights else self.gnconv(y)
        x = self._add(x, y, None if into_weights else self.gamma1)
        y = cheap(self.norm2, x, is_operand=type(self.pwconv1) is PointwiseLinear)
        y = cheap(self.act, self.pwconv1(y), is_operand=type(self.pwconv2) is PointwiseLinear)
        y = self.pwconv2(y, self.gamma2) if into_weights else self.pwconv2(y)
        return self._add(x, y, None if into_weights else self.gamma2)

    def _uses_triton(self) -> bool:
        """For inference, and for the layers that the kernels stand for."""
        return (
            not self.training
            and not torch.is_grad_enabled()
            and type(self.gnconv) is GnConv
            and self.gnconv.use_triton
            and type(self.norm1) is LayerNorm2d
            and type(self.gnconv.proj_in) is PointwiseConv
            and not has_hooks(self.norm1, self.gnconv, self.gnconv.proj_in)
        )

    def _gnconv_by_triton(self, x: Tensor) -> Tensor:
        from .ops.kernels import norm_linear  # only now, for it imports Triton

        return self.gnconv.recursion(norm_linear(x, self.norm1, self.gnconv.proj_in))

    @torch.jit.ignore
    def scales_weights(self, x: Tensor) -> bool:
        """Whether the layer scale is multiplied into weights, which saves activations.

        Not where the map has fewer pixels than the weight has rows: then it is the smaller one. Not
        in float16, where an initial scale of 1e-6 times a weight is 0.
        """
        if not (
            not isinstance(x, torch.fx.Proxy)
            and type(self.gnconv) is GnConv
            and type(self.gnconv.proj_out) is PointwiseConv
            and type(self.pwconv2) is PointwiseLinear
        ):
            return False  # in a symbolic trace, or another layer in the place of one that can
        if x.shape[0] * x.shape[2] * x.shape[3] < self.pwconv2.in_features:
            return False
        return (autocast_dtype(x) or self.pwconv2.weight.dtype) != torch.float16

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Folds s, the layer scale and the norms' weights into the layers beside them.

        For inference: the function stays, the parameters gamma1, gamma2 and those of the norms go.
        """
        if type(self.gnconv) is not GnConv:
            return
        self.gnconv.reparameterize()
        first, last = self.gnconv.proj_in, self.gnconv.proj_out
        if type(first) is PointwiseConv:
            fold_norm(self.norm1, first)
        if type(self.pwconv1) is PointwiseLinear:
            fold_norm(self.norm2, self.pwconv1)
            if type(self.act) is nn.GELU and self.act.approximate == "none":
                self.pwconv1.gelu, self.act = True, nn.Identity()
        if self.gamma1 is not None and type(last) is PointwiseConv:
            fold_scale(last, self.gamma1)
            self.gamma1 = None
        if self.gamma2 is not None and type(self.pwconv2) is PointwiseLinear:
            fold_scale(self.pwconv2, self.gamma2)
            self.gamma2 = None

    def _add(self, x: Tensor, y: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is None:
            return x + self.drop_path(y)
        if self.training:
            return x + self.drop_path(y * gamma[:, None, None])
        return torch.addcmul(x, y, gamma[:, None, None])


class Stage(nn.Sequential):
    """Blocks in a row; recomputed in the backward pass if grad_checkpointing is set.

    With lean_memory only what is cheap of them is.
    """

    def __init__(self, *blocks: Block) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False
        self.lean_memory = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        if not torch.jit.is_scripting() and self.lean_memory and torch.is_grad_enabled():
            return self._forward_lean(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.ignore
    def _forward_lean(self, x: Tensor) -> Tensor:
        for block in self:
            with lean_memory():
                x = block(x)
        return x
