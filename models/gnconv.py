"""GnConv: recursive gated convolution (HorNet, section 3).

Shapes: x (batch, C_in, H, W) -> (batch, C_out, H, W). With order n and C = C_out, the recursion
runs over the widths C_k = C / 2**(n - 1 - k), k = 0 ... n - 1. Tensors are logically channels
first; in memory they are best channels last, and stay so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .global_filter import GlobalLocalFilter
from .layers import DepthwiseConv, PointwiseConv, fold_scale
from .lean import cheap, has_hooks
from .ops.recompute import cheap_product


class GnConv(nn.Module):
    """Recursive gated convolution g^nConv, a drop-in layer for any input and output width.

    Equations 3.3 to 3.5 of the paper:

        [p_0, q_0, ..., q_{n-1}] = proj_in(x),      q_k <- s * depthwise(q_k)
        p_1     = p_0 * q_0
        p_{k+1} = pws_{k-1}(p_k) * q_k              for k = 1 ... n - 1
        y       = proj_out(p_n)

    (The paper writes 1 / alpha for s.) The depthwise mixer runs once over all q_k.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output and of the recursion; None means in_channels.
        order: n, the order of the spatial interactions; 1 or more.
        kernel_size: Kernel of the depthwise convolution, odd; unused with another mixer.
        scale: s, multiplied onto the depthwise output.
        global_filter: (h, w) of a GlobalLocalFilter to use instead of the depthwise convolution.
        global_filter_impl: 'fft', or 'matmul' for the path without complex numbers.
        mixer: Any other depthwise mixer: called with the number of channels, returns a module.

    Raises:
        ValueError: there are no input channels, out_channels can't be halved n - 1 times, the
            kernel is even, or both a global filter and a mixer are asked for.

    Source: HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        order: int = 5,
        kernel_size: int = 7,
        scale: float = 1.0,
        global_filter: tuple[int, int] | None = None,
        global_filter_impl: str = "fft",
        mixer: Callable[[int], nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if in_channels < 1:
            raise ValueError(f"a GnConv needs at least 1 input channel, not {in_channels}")
        channels = in_channels if out_channels is None else out_channels
        self.order = order
        self.scale = scale
        self.use_triton = False
        self.dims = recursion_widths(channels, order)
        total = sum(self.dims)
        if mixer is not None and global_filter is not None:
            raise ValueError("choose either a mixer or a global filter, not both")

        self.proj_in = PointwiseConv(in_channels, self.dims[0] + total, **factory)
        if mixer is not None:
            self.dwconv = mixer(total)
        elif global_filter is not None:
            h, w = global_filter
            self.dwconv = GlobalLocalFilter(total, h, w, impl=global_filter_impl, **factory)
        else:
            self.dwconv = DepthwiseConv(total, kernel_size, **factory)
        self.proj_out = PointwiseConv(channels, channels, **factory)
        self.pws = nn.ModuleList(
            PointwiseConv(narrow, wide, **factory)
            for narrow, wide in zip(self.dims[:-1], self.dims[1:], strict=True)
        )

    def forward(self, x: Tensor, out_scale: Tensor | None = None) -> Tensor:
        """`out_scale` (C_out) multiplies the output, by way of the weights of proj_out."""
        return self.recursion(self.proj_in(x), out_scale)

    def recursion(self, x: Tensor, out_scale: Tensor | None = None) -> Tensor:
        """The output of proj_in -> that of proj_out, scaled as in `forward`."""
        p, q_all = torch.split(x, [self.dims[0], x.shape[1] - self.dims[0]], dim=1)
        if not torch.jit.is_scripting() and self.scales_inside():
            q_all = self.dwconv(q_all, self.scale)
        else:
            q_all = self.dwconv(q_all)
            if self.scale != 1.0:
                q_all = q_all * self.scale
        if not torch.jit.is_scripting() and out_scale is None and self._projects_by_triton():
            y = self._projection_by_triton(p, q_all)
            if y is not None:
                return y
        q = torch.split(q_all, self.dims, dim=1)
        p = cheap_product(p, q[0])
        for k, pw in enumerate(self.pws):
            # noqa below: TorchScript passes no modules to functions
            if torch.jit.is_scripting():  # noqa: SIM108
                wider = pw(p)
            else:
                wider = cheap(pw, p)
            p = cheap_product(wider, q[k + 1])
        if out_scale is None:
            return self.proj_out(p)
        return self.proj_out(p, out_scale)

    @torch.jit.ignore
    def _projects_by_triton(self) -> bool:
        """For inference, and for the layers that the kernel stands for."""
        layers = (*self.pws, self.proj_out)
        return (
            self.use_triton
            and not torch.is_grad_enabled()
            and all(type(layer) is PointwiseConv for layer in layers)
            and not has_hooks(*layers)
        )

    @torch.jit.ignore
    def _projection_by_triton(self, p: Tensor, q_all: Tensor) -> Tensor | None:
        from .ops.kernels import gated_projection  # only now, for it imports Triton

        return gated_projection(p, q_all, list(self.pws), self.proj_out)

    @torch.jit.ignore
    def scales_inside(self) -> bool:
        """Whether the mixer is one that takes s into its weights."""
        return type(self.dwconv) in (DepthwiseConv, GlobalLocalFilter)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Folds s into the mixer, for inference; not into a mixer from outside."""
        if self.scales_inside() and self.scale != 1.0:
            mixer: Any = self.dwconv
            last = mixer.post_norm if isinstance(mixer, GlobalLocalFilter) else mixer
            fold_scale(last, torch.tensor(self.scale))
            self.scale = 1.0

    def extra_repr(self) -> str:
        return f"order={self.order}, scale={self.scale:.4g}"


class gnconv(GnConv):  # noqa: N801 - the name that other HorNet code imports
    """GnConv under the name and signature of other HorNet code.

    Args:
        dim: Channels of input and output.
        order: Order of the spatial interactions.
        gflayer: None for a 7x7 depthwise convolution, or a class called as
            `gflayer(channels, h=h, w=w)`, such as GlobalLocalFilter.
        h: Height of the filter of gflayer.
        w: Width of the filter of gflayer.
        s: Scale of the depthwise output.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        gflayer: Callable[..., nn.Module] | None = None,
        h: int = 14,
        w: int = 8,
        s: float = 1.0,
    ) -> None:
        mixer = None
        if gflayer is not None:
            layer = gflayer

            def mixer(channels: int) -> nn.Module:
                return layer(channels, h=h, w=w)

        super().__init__(dim, order=order, scale=s, mixer=mixer)


def recursion_widths(channels: int, order: int) -> list[int]:
    """Widths C_0 ... C_{n-1} of the recursion, doubling up to `channels`.

    Raises:
        ValueError: the order is less than 1, or channels can't be halved order - 1 times.
    """
    if order < 1 or order != int(order):
        raise ValueError(f"the order of a GnConv is a whole number from 1 on, not {order}")
    multiple = 2 ** (order - 1)
    if channels < 1 or channels % multiple:
        raise ValueError(
            f"a GnConv of order {order} needs a multiple of {multiple} channels, not {channels}"
        )
    return [channels // 2**k for k in reversed(range(order))]
