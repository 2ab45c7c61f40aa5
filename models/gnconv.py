"""gnConv, the recursive gated convolution, and the global filter of the GF models.

Source: HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284), section 3. Shapes: (B, C, H, W).
These are the definitions; `accelerate` replaces them by fast/layers.py, in main.py and the tools.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.fx
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .layers import CONVOLUTIONS, depthwise_conv
from .spectral import IMPLEMENTATIONS, spectral_filter

torch.fx.wrap("spectral_filter")  # symbolic tracers take it as one operation


class GnConv(nn.Module):
    """Recursive gated convolution g^nConv, a drop-in layer for any input and output width.

    Equations 3.3 to 3.5 of the paper, which writes 1 / alpha for s:

        [p_0, q_0, ..., q_{n-1}] = proj_in(x),      q_k <- s * dwconv(q_k)
        p_1     = p_0 * q_0
        p_{k+1} = pws_{k-1}(p_k) * q_k              for k = 1 ... n - 1
        y       = proj_out(p_n)

    With C = dim_ratio * out_channels, p_{k+1} and q_k have C_k = C / 2**(n - 1 - k) channels
    (equation 3.6). main.py trains fast.layers.FastGnConv, the same function.

    Maps (B, in_channels, H, W) -> (B, out_channels, H, W); without proj_out (B, C, H, W). With
    spatial_dims=3 they are volumes (B, channels, D, H, W), with 1 sequences (B, channels, L).

    Args:
        out_channels: Width of the output; None means in_channels.
        order: n, the order of the spatial interactions; 1 or more.
        kernel_size: Kernel of the depthwise convolution, odd; unused with another mixer.
        scale: s, multiplied onto the depthwise output.
        global_filter: (h, w) of a GlobalLocalFilter to use instead of the depthwise convolution:
            (H, W // 2 + 1) for maps of H x W.
        global_filter_impl: 'fft', or 'matmul' for the path without complex numbers.
        mixer: Any other depthwise mixer: called with the number of channels, returns a module.
        dim_ratio: Width C of the recursion as a multiple of out_channels.
        proj_out: False leaves the output projection out: y = p_n.
        spatial_dims: 1, 2 or 3; a global filter has 2.

    Raises:
        ValueError: there are no input channels, dim_ratio is not a whole number from 1 on, C can't
            be halved n - 1 times, the kernel is even, spatial_dims is none of these numbers, the
            global filter is no pair, or both it and a mixer are asked for.
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
        dim_ratio: int = 1,
        proj_out: bool = True,
        spatial_dims: int = 2,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if in_channels < 1:
            raise ValueError(f"a GnConv needs at least 1 input channel, not {in_channels}")
        if dim_ratio < 1 or dim_ratio != int(dim_ratio):
            raise ValueError(f"dim_ratio of a GnConv is a whole number from 1 on, not {dim_ratio}")
        is_pair = isinstance(global_filter, Sequence) and len(global_filter) == 2
        if global_filter is not None and not is_pair:
            raise ValueError(
                "global_filter is (H, W // 2 + 1) for maps of H x W, as (14, 8) for 14 x 14, not "
                f"{global_filter}"
            )
        if mixer is not None and global_filter is not None:
            raise ValueError("choose either a mixer or a global filter, not both")
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"a GnConv has 1, 2 or 3 spatial dimensions, not {spatial_dims}")
        if spatial_dims != 2 and global_filter is not None:
            raise ValueError(f"a global filter has 2 spatial dimensions, not {spatial_dims}")
        conv = CONVOLUTIONS[spatial_dims]
        channels = in_channels if out_channels is None else out_channels
        self.order = order
        self.scale = scale
        width = int(dim_ratio) * channels
        self.dims = recursion_widths(width, order)
        total = sum(self.dims)
        self.proj_in = conv(in_channels, self.dims[0] + total, 1, **factory)
        if mixer is not None:
            self.dwconv: nn.Module = mixer(total)
        elif global_filter is not None:
            self.dwconv = GlobalLocalFilter(total, *global_filter, global_filter_impl, **factory)
        else:
            self.dwconv = depthwise_conv(total, kernel_size, spatial_dims=spatial_dims, **factory)
        self.proj_out = conv(width, channels, 1, **factory) if proj_out else nn.Identity()
        self.pws = nn.ModuleList(
            conv(narrow, wide, 1, **factory) for narrow, wide in pairwise(self.dims)
        )

    def forward(self, x: Tensor) -> Tensor:
        p, q_all = torch.split(self.proj_in(x), [self.dims[0], sum(self.dims)], dim=1)
        q = torch.split(self.dwconv(q_all) * self.scale, self.dims, dim=1)
        p = p * q[0]
        for k, pw in enumerate(self.pws):
            p = pw(p) * q[k + 1]
        return self.proj_out(p)

    def extra_repr(self) -> str:
        return f"order={self.order}, scale={self.scale:.4g}"


class GlobalLocalFilter(nn.Module):
    """Mix the first half of the channels locally, the second half globally.

    x -> norm -> [depthwise convolution | global filter] -> interleave -> norm

    The halves are interleaved channel by channel: local 0, global 0, local 1, global 1, ... The
    global filter is GFNet's (arXiv 2107.00645): a circular convolution by a filter stored in the
    frequency domain for maps of H x W with h = H and w = W // 2 + 1, and resized bilinearly for
    others. It computes in float32 at least, whatever the input, autocast or not.

    Args:
        dim: Number of channels, even.
        h, w: Height and width of the stored filter.
        impl: 'fft', or 'matmul' for the path without complex numbers; ValueError for others.
        kernel_size: Kernel of the depthwise convolution, odd.
    """

    def __init__(
        self,
        dim: int,
        h: int = 14,
        w: int = 8,
        impl: str = "fft",
        kernel_size: int = 3,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"a global filter needs an even number of channels, not {dim}")
        if h < 1 or w < 1:
            raise ValueError(f"a global filter needs a positive height and width, not {h} x {w}")
        factory = {"device": device, "dtype": dtype}
        self.set_impl(impl)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, h, w, 2, **factory))
        self.dw = depthwise_conv(dim // 2, kernel_size, bias=False, **factory)
        self.pre_norm = LayerNorm2d(dim, eps=1e-6, **factory)
        self.post_norm = LayerNorm2d(dim, eps=1e-6, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the complex filter: truncated normal, standard deviation 0.02."""
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def set_impl(self, impl: str) -> None:
        """Choose 'fft' or 'matmul'; the parameters are the same."""
        self.impl = _known_impl(impl)

    def forward(self, x: Tensor) -> Tensor:
        local, spectral = self.pre_norm(x).chunk(2, dim=1)
        local = self.dw(local)
        spectral = spectral_filter(spectral, self.complex_weight, self.impl).to(local.dtype)
        return self.post_norm(torch.stack((local, spectral), dim=2).flatten(1, 2))


class gnconv(GnConv):  # noqa: N801 - the name that other HorNet code imports
    """GnConv under the name and signature of the release.

    `gflayer` is None for a 7x7 depthwise convolution, or called as gflayer(channels, h=h, w=w), as
    GlobalLocalFilter can be; s is the scale of the depthwise output.
    """

    def __init__(self, dim: int, order: int = 5, gflayer: Callable[..., nn.Module] | None = None,
                 h: int = 14, w: int = 8, s: float = 1.0) -> None:  # fmt: skip
        mixer = None if gflayer is None else lambda channels: gflayer(channels, h=h, w=w)
        super().__init__(dim, order=order, scale=s, mixer=mixer)


def recursion_widths(channels: int, order: int) -> list[int]:
    """Widths C_0 ... C_{n-1} of the recursion, doubling up to `channels` (equation 3.6)."""
    if order < 1 or order != int(order):
        raise ValueError(f"the order of a GnConv is a whole number from 1 on, not {order}")
    multiple = 2 ** (order - 1)
    if channels < 1 or channels % multiple:
        raise ValueError(
            f"a GnConv of order {order} needs a multiple of {multiple} channels, not {channels}"
        )
    return [channels // 2**k for k in reversed(range(order))]


def set_global_filter_impl(module: nn.Module, impl: str) -> None:
    """Set every GlobalLocalFilter inside `module` to 'fft' or 'matmul'; ValueError for others."""
    _known_impl(impl)
    for child in module.modules():
        if isinstance(child, GlobalLocalFilter):
            child.set_impl(impl)


def _known_impl(impl: str) -> str:
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown global filter implementation {impl!r}: use {known}")
    return impl
