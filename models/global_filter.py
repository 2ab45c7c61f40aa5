"""GlobalLocalFilter: the depthwise mixer of HorNet's GF models (section 3 of the paper)."""

import torch
from timm.layers import LayerNorm2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from .layers import DepthwiseConv, ScaledLayerNorm2d
from .lean import cheap
from .ops.dispatch import is_recorded
from .ops.global_filter import filter_by_fft, filter_by_matmul

IMPLEMENTATIONS = ("fft", "matmul", "triton")


@register_notrace_module  # its branch on the map's size can't be traced symbolically
class GlobalLocalFilter(nn.Module):
    """Mix the first half of the channels locally, the second half globally.

    x -> norm -> [3x3 depthwise convolution | global filter] -> interleave -> norm

    The halves are interleaved channel by channel: local 0, global 0, local 1, global 1, ...
    Input and output: (batch, dim, height, width), any height and width; the filter is resized
    bilinearly unless the map is H x W with H = h and W // 2 + 1 = w. The Fourier transforms run in
    float32 at least, whatever the input, autocast or not.

    Args:
        dim: Number of channels, even.
        h: Height of the stored filter.
        w: Width of the stored filter: that of the maps it is made for, W // 2 + 1.
        impl: 'fft', 'matmul' for the path without complex numbers, or 'triton' for a GPU kernel.

    Raises:
        ValueError: dim is odd, the filter is empty, or impl is unknown.

    Source: HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284), section 3; the global filter
    is GFNet's (arXiv 2107.00645).
    """

    def __init__(
        self, dim: int, h: int = 14, w: int = 8, impl: str = "fft", device=None, dtype=None
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"a global filter needs an even number of channels, not {dim}")
        if h < 1 or w < 1:
            raise ValueError(f"a global filter needs a positive height and width, not {h} x {w}")
        factory = {"device": device, "dtype": dtype}
        half = dim // 2
        self.impl = _known(impl)
        self.complex_weight = nn.Parameter(torch.empty(half, h, w, 2, **factory))
        self.dw = DepthwiseConv(half, 3, bias=False, **factory)
        self.pre_norm = LayerNorm2d(dim, eps=1e-6, **factory)
        self.post_norm = ScaledLayerNorm2d(dim, eps=1e-6, **factory)
        self.reset_filter()

    @torch.jit.ignore
    def reset_filter(self) -> None:
        """Initialise the complex filter: truncated normal, standard deviation 0.02."""
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    @torch.jit.ignore
    def set_impl(self, impl: str) -> None:
        """Choose 'fft', 'matmul' or 'triton'; the parameters are the same."""
        self.impl = _known(impl)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` multiplies the output, by way of the last norm's weight and bias."""
        # noqa below: TorchScript passes no modules to functions
        if torch.jit.is_scripting():  # noqa: SIM108
            x = self.pre_norm(x)
        else:
            x = cheap(self.pre_norm, x)
        x_local, x_global = x.chunk(2, dim=1)
        x_local = self.dw(x_local)
        x_global = _filter(x_global, self.complex_weight, self.impl)
        x = _interleave(x_local, x_global.to(x_local.dtype))
        # noqa below: TorchScript passes no modules to functions
        if torch.jit.is_scripting():  # noqa: SIM108
            x = self.post_norm(x, scale)
        else:
            x = cheap(self.post_norm, x, scale)
        return x


@torch.fx.wrap  # one node of a symbolic trace, which cannot see the layout's reason
def _interleave(a: Tensor, b: Tensor) -> Tensor:
    """Maps (B, C, H, W) -> (B, 2 C, H, W): channel 0 of a, channel 0 of b, channel 1 of a, ..."""
    if is_recorded():  # other libraries lay maps out as they are written
        return torch.stack((a, b), dim=2).flatten(1, 2)
    # along the last axis of the channels-last layout, where it moves least
    halves = (a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1))
    return torch.stack(halves, dim=-1).flatten(-2).permute(0, 3, 1, 2)


@torch.fx.wrap  # one node of a symbolic trace, for the same reason
def _filter(x_bchw: Tensor, weight: Tensor, impl: str) -> Tensor:
    if not torch.jit.is_scripting() and impl == "triton":
        return _filter_by_triton(x_bchw, weight)
    # half-precision FFTs on GPUs take powers of two only, and bfloat16 ones don't exist
    if x_bchw.dtype == torch.float16 or x_bchw.dtype == torch.bfloat16:
        x_bchw = x_bchw.float()
    if impl == "matmul":
        return filter_by_matmul(x_bchw, weight)
    return filter_by_fft(x_bchw, weight)


@torch.jit.ignore
def _filter_by_triton(x_bchw: Tensor, weight: Tensor) -> Tensor:
    from .ops.kernels import filter_by_kernel  # only now, for it imports Triton

    return filter_by_kernel(x_bchw, weight)


def set_global_filter_impl(module: nn.Module, impl: str) -> None:
    """Set every GlobalLocalFilter inside `module` to 'fft', 'matmul' or 'triton'.

    Raises:
        ValueError: impl is unknown.
    """
    _known(impl)
    for child in module.modules():
        if isinstance(child, GlobalLocalFilter):
            child.set_impl(impl)


def _known(impl: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown global filter implementation {impl!r}: use {', '.join(IMPLEMENTATIONS)}"
        )
    return impl
