"""GPU kernels in Triton: depthwise convolution and global filter; for inference also norm with
proj_in, and the recursion with proj_out.

They are registered as custom operators, for torch.compile; the first two have gradients. Where
Triton, the device or the shape doesn't allow a kernel, PyTorch's operators run instead, and the
reason is logged once. TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests.

Shapes: x (B, C, H, W), channels last in memory, or a slice of such channels; results are channels
last.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..spectral import resize_filter, spectral_filter
from . import layers
from .depthwise import depthwise
from .dispatch import autocast_dtype

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

MOST_PIXELS = 256
"""Largest feature map of the global filter's kernel, which holds all pixels in shared memory."""
MOST_CHANNELS = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}
"""Largest width of the recursion's kernel, which holds the weights in shared memory."""
CAPABILITY = (8, 0)
"""Lowest compute capability with that much shared memory: 99 KB per program."""


class TritonDepthwiseConv(layers.DepthwiseConv):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return depthwise_conv(x, weight, bias)


class TritonFilter(layers.FastFilter):
    def filter(self, x: Tensor) -> Tensor:
        return filter_by_kernel(x, self.complex_weight)


class TritonGnConv(layers.FastGnConv):
    """In inference, gates and proj_out are one kernel."""

    def gates(self, p: Tensor, q_all: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is None and not torch.is_grad_enabled() and _are_known(*self.pws, self.proj_out):
            y = gated_projection(p, q_all, list(self.pws), self.proj_out)
            if y is not None:
                return y
        return super().gates(p, q_all, gamma)


class TritonBlock(layers.FastBlock):
    """In inference, the first norm and proj_in are one kernel."""

    def mix(self, x: Tensor) -> Tensor:
        gnconv: Any = self.gnconv
        if torch.is_grad_enabled() or not _are_known(self.norm1, gnconv, gnconv.proj_in):
            return super().mix(x)
        return gnconv.recursion(norm_linear(x, self.norm1, gnconv.proj_in))


class TritonLeanBlock(TritonBlock, layers.LeanBlock):
    pass


_WITH_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    layers.DepthwiseConv: TritonDepthwiseConv,
    layers.FastFilter: TritonFilter,
    layers.FastGnConv: TritonGnConv,
    layers.FastBlock: TritonBlock,
    layers.LeanBlock: TritonLeanBlock,
}


def use_kernels(model: nn.Module) -> None:
    """Give the layers of an accelerated model the classes above."""
    for module in model.modules():
        module.__class__ = _WITH_KERNELS.get(type(module), type(module))


def _are_known(*modules: nn.Module) -> bool:
    """Return whether a kernel may replace these layers: classes of ours, without hooks."""
    # torch 2.9 traces no union of types
    known = (layers.PointwiseConv, layers.NarrowConv, layers.Norm, layers.FastGnConv)
    return all(
        isinstance(module, known) and not (module._forward_hooks or module._forward_pre_hooks)
        for module in modules
    )


def reason_against(x: Tensor) -> str:
    """Return why the kernels can't process x; '' if they can."""
    if triton is None:
        return "Triton is not installed"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on {x.device.type}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return f"a GPU older than compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if x.numel() == 0:
        return "the batch is empty"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {x.dtype}"
    if x.stride(1) != 1 or x.stride(2) != x.shape[3] * x.stride(3):
        return "the map is not channels last"
    return ""


def _serve(what: str, *maps: Tensor, limit: str = "") -> bool:
    """Return whether the kernels can process these maps, without a `limit`; log once why not."""
    reason = next(filter(None, map(reason_against, maps)), limit)
    if reason and not torch.compiler.is_compiling():  # logging would break the graph
        _log(what, reason)
    return not reason


@cache
def _log(what: str, reason: str) -> None:
    logger.warning("%s runs on PyTorch's operators: %s", what, reason)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the depthwise convolution of x by weight (C, 1, K, K), K odd, of the same size.

    Like the global filter, it has first derivatives only.
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    if not _serve("the depthwise convolution", x):
        return depthwise(x, weight, bias)
    y = _depthwise(x, weight)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def filter_by_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """Like spectral_filter, computed in float32."""
    height, width = x.shape[2:]
    limit = f"maps of more than {MOST_PIXELS} pixels" if height * width > MOST_PIXELS else ""
    if not _serve("the global filter", x, limit=limit):
        return spectral_filter(x, weight)
    planes = resize_filter(weight.float(), height, width // 2 + 1).flatten(1, 2)  # (C, F, 2)
    return _spectral(x, planes.permute(2, 1, 0).contiguous())


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Module) -> Tensor:
    """Return layer(norm(x)) for a pointwise layer, without gradients."""
    if not _serve("norm and proj_in", x):
        return layer(norm(x))
    return _norm_linear(x, *_parameters(layer, x), norm.weight, norm.bias, norm.eps)


def gated_projection(
    p: Tensor, q_all: Tensor, pws: Sequence[nn.Module], proj_out: Any
) -> Tensor | None:
    """Return the recursion of p_0 and all q_k with proj_out, without gradients.

    None if there is no kernel for it.
    """
    channels = proj_out.weight.shape[1]  # the width of the recursion
    most = MOST_CHANNELS.get(autocast_dtype(p) or p.dtype, 0)
    fits = len(pws) in (1, 2) and channels <= most
    limit = "" if fits else f"order {len(pws) + 1} at {channels} channels"
    if not _serve("the gated recursion", p, q_all, limit=limit):
        return None
    weights, biases = zip(*(_parameters(layer, p) for layer in (*pws, proj_out)), strict=True)
    return _gated_projection(p, q_all.to(p.dtype), list(weights), list(biases))


def _parameters(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (N, C) and bias of a pointwise layer in the dtype of its product with x."""
    dtype = autocast_dtype(x) or x.dtype
    return layer.weight.detach().flatten(1).to(dtype), layer.bias.detach().to(dtype)


if triton is not None:

    @triton.jit
    def _values(at, live, c, C):
        """Channels c < C of the live pixels whose channel 0 is at `at`, in float32; 0 elsewhere."""
        mask = live[:, None] & (c < C)[None, :]
        return tl.load(at[:, None] + c, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _product(values, weight, c, n, C, N):
        """values (rows, C) times weight (N, C) transposed, in the precision of the weight."""
        mask = (c < C)[:, None] & (n < N)[None, :]
        w = tl.load(weight + n[None, :] * C + c[:, None], mask=mask, other=0.0)
        return tl.dot(values.to(weight.dtype.element_ty), w, input_precision="ieee")

    @triton.jit
    def _vector(at, c, C):
        """The values c < C of a vector in float32, (1, C); 0 elsewhere."""
        return tl.load(at + c, mask=c < C, other=0.0).to(tl.float32)[None, :]

    @triton.jit
    def _store(y, values, row, live, c, C):
        """Write channels c < C of the live rows of y (rows, C)."""
        at = y + row.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(at, values.to(y.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])

    @triton.jit
    def _norm_linear_kernel(
        x, weight, bias, scale, shift, y, ROWS, N, C, PIXELS, x_batch, x_pixel, eps,
        AFFINE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_R pixels of y, BLOCK_N channels. weight (N, C)."""
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = row < ROWS
        at = x + (row // PIXELS).to(tl.int64) * x_batch + (row % PIXELS) * x_pixel
        total = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, C, BLOCK_C):
            total += tl.sum(_values(at, live, start + tl.arange(0, BLOCK_C), C), axis=1)
        mean = total / C
        squares = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = live[:, None] & (c < C)[None, :]
            centred = tl.where(mask, _values(at, live, c, C) - mean[:, None], 0.0)
            squares += tl.sum(centred * centred, axis=1)
        factor = 1.0 / tl.sqrt(squares / C + eps)
        result = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            values = (_values(at, live, c, C) - mean[:, None]) * factor[:, None]
            if AFFINE:
                values *= _vector(scale, c, C)
                values += _vector(shift, c, C)
            values = tl.where(live[:, None] & (c < C)[None, :], values, 0.0)
            result += _product(values, weight, c, n, C, N)
        _store(y, result + _vector(bias, n, N), row, live, n, N)

    @triton.jit
    def _gated_kernel(
        p, q, w_1, b_1, w_2, b_2, w_out, b_out, y, ROWS, C_0, C_1, C_2, C, PIXELS,
        p_batch, p_pixel, q_batch, q_pixel,
        THREE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
        BLOCK_2: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_R pixels: p_1 = p q_0, p_2 = (p_1 w_1 + b_1) q_1, of order three p_3 likewise; then
        y = the last of them, C_2 wide, times w_out, plus b_out. Weights (out, in)."""
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = row < ROWS
        batch, pixel = (row // PIXELS).to(tl.int64), row % PIXELS
        at_p = p + batch * p_batch + pixel * p_pixel
        at_q = q + batch * q_batch + pixel * q_pixel
        c, d = tl.arange(0, BLOCK_0), tl.arange(0, BLOCK_1)
        last = _values(at_p, live, c, C_0) * _values(at_q, live, c, C_0)
        wider = _product(last, w_1, c, d, C_0, C_1) + _vector(b_1, d, C_1)
        wider *= _values(at_q + C_0, live, d, C_1)
        last, e = wider, d
        if THREE:
            e = tl.arange(0, BLOCK_2)
            last = _product(wider, w_2, d, e, C_1, C_2) + _vector(b_2, e, C_2)
            last *= _values(at_q + C_0 + C_1, live, e, C_2)
        operand = last.to(w_out.dtype.element_ty)
        for start in range(0, C, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            result = _product(operand, w_out, e, n, C_2, C) + _vector(b_out, n, C)
            _store(y, result, row, live, n, C)

    @triton.jit
    def _depthwise_kernel(
        x, weight, y, H, W, C, x_batch, x_pixel,
        K: tl.constexpr, FLIPPED: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """A row of y: pixels BLOCK_W, channels BLOCK_C. weight (K * K, C)."""
        row = tl.program_id(0)
        batch, h = (row // H).to(tl.int64), row % H
        w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
        for tap in tl.static_range(K * K):
            # a vector, since Triton's interpreter takes no mask made of a scalar
            from_h = h + tap // K - K // 2 + tl.zeros_like(w)
            from_w = w + tap % K - K // 2
            inside = (from_h >= 0) & (from_h < H) & (from_w >= 0) & (from_w < W)
            pixels = batch * x_batch + (from_h * W + from_w) * x_pixel
            index = (K * K - 1 - tap) if FLIPPED else tap
            total += _values(x + pixels, inside, c, C) * _vector(weight + index * C, c, C)
        _store(y, total, row.to(tl.int64) * W + w, w < W, c, C)

    @triton.jit
    def _depthwise_weight_kernel(
        x, g, out, ROWS, H, W, C, x_batch, x_pixel, g_batch, g_pixel, rows_a_program,
        K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """The gradient of a row of the weight, from some rows of the maps: out (part, K, K, C)."""
        part, i = tl.program_id(0), tl.program_id(1)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        j = tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        for row in range(part * rows_a_program, min((part + 1) * rows_a_program, ROWS)):
            batch, h = row // H, row % H
            for start in range(0, W, BLOCK_W):
                w = start + tl.arange(0, BLOCK_W)
                at = batch.to(tl.int64) * g_batch + (h * W + w) * g_pixel
                gradient = _values(g + at, w < W, c, C)
                from_w = w[None, :] + j[:, None] - K // 2
                from_h = h + i - K // 2 + tl.zeros_like(from_w)
                inside = (from_h >= 0) & (from_h < H) & (from_w >= 0) & (from_w < W)
                at_x = batch.to(tl.int64) * x_batch + (from_h * W + from_w) * x_pixel
                mask_x = inside[:, :, None] & (c < C)[None, None, :]
                values = tl.load(x + at_x[:, :, None] + c[None, None, :], mask=mask_x, other=0.0)
                total += tl.sum(values.to(tl.float32) * gradient[None, :, :], axis=1)
        _store(out, total, (part * K + i) * K + j, j < K, c, C)

    @triton.jit
    def _complex(at, row, c, ROWS, C):
        """Real and imaginary part, the halves of a matrix (2, ROWS, C); 0 outside."""
        mask = (row < ROWS)[:, None] & (c < C)[None, :]
        at_real = at + row[:, None] * C + c[None, :]
        real = tl.load(at_real, mask=mask, other=0.0)
        return real, tl.load(at_real + ROWS * C, mask=mask, other=0.0)

    @triton.jit
    def _spectral_kernel(
        x, planes, analysis, synthesis, y, PIXELS, FREQUENCIES, C, x_batch, x_pixel,
        BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """All pixels of an image, BLOCK_C channels. planes (2, F, C), analysis (2, F, P),
        synthesis (2, F, P): spectrum = analysis x, y = transposed synthesis of its product."""
        batch = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        p = tl.arange(0, BLOCK_P)
        image = _values(x + batch * x_batch + p * x_pixel, p < PIXELS, c, C)
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(0, FREQUENCIES, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            of_real, of_imag = _complex(analysis, f, p, FREQUENCIES, PIXELS)
            # three TF32 products have nearly the precision of float32
            real = tl.dot(of_real, image, input_precision="tf32x3")
            imag = tl.dot(of_imag, image, input_precision="tf32x3")
            k_real, k_imag = _complex(planes, f, c, FREQUENCIES, C)
            to_real, to_imag = _complex(synthesis, f, p, FREQUENCIES, PIXELS)
            real, imag = real * k_real - imag * k_imag, real * k_imag + imag * k_real
            total += tl.dot(tl.trans(to_real), real, input_precision="tf32x3")
            total += tl.dot(tl.trans(to_imag), imag, input_precision="tf32x3")
        _store(y, total, batch * PIXELS + p, p < PIXELS, c, C)


def _map_like(x: Tensor, dtype: torch.dtype, channels: int | None = None) -> Tensor:
    """Return an empty channels-last map of the size of x, perhaps with other channels."""
    shape = (len(x), *x.shape[2:], channels or x.shape[1])
    return x.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


def _power_of_two(number: int, most: int) -> int:
    return min(most, max(16, 1 << (number - 1).bit_length()))


def _depthwise_run(x: Tensor, weight: Tensor, flipped: bool) -> Tensor:
    y = _map_like(x, x.dtype)
    taps = weight.flatten(1).t().contiguous()  # (K * K, C)
    batch, channels, height, width = x.shape
    block_w, block_c = 16, _power_of_two(channels, 32)  # twice as many would spill registers
    grid = (batch * height, triton.cdiv(width, block_w), triton.cdiv(channels, block_c))
    with torch.cuda.device_of(x):
        _depthwise_kernel[grid](
            x, taps, y, height, width, channels, x.stride(0), x.stride(3),
            K=weight.shape[-1], FLIPPED=flipped, BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return y


@torch.library.custom_op("hornet::norm_linear", mutates_args=())
def _norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    batch, channels, height, width = x.shape
    y = _map_like(x, weight.dtype, len(weight))
    rows, block_r, block_n = batch * height * width, 64, 64
    grid = (triton.cdiv(rows, block_r), triton.cdiv(len(weight), block_n))
    affine = scale is not None
    with torch.cuda.device_of(x):
        _norm_linear_kernel[grid](
            x, weight, bias, scale if affine else bias, shift if affine else bias, y,
            rows, len(weight), channels, height * width, x.stride(0), x.stride(3), eps,
            AFFINE=affine, BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_C=32,
        )  # fmt: skip
    return y


@torch.library.custom_op(
    "hornet::gated_projection",
    mutates_args=(),
    # torch 2.6 and later infer it from different types of lists
    schema="(Tensor p, Tensor q, Tensor[] weights, Tensor[] biases) -> Tensor",
)
def _gated_projection(p: Tensor, q: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    batch, _, height, width = p.shape
    channels = len(weights[-1])
    y = _map_like(p, weights[-1].dtype, channels)
    rows, block_r = batch * height * width, 32
    widths = [p.shape[1], *(len(weight) for weight in weights[:-1])]
    blocks = [_power_of_two(width, 256) for width in widths]
    with torch.cuda.device_of(p):
        _gated_kernel[(triton.cdiv(rows, block_r),)](
            p, q, weights[0], biases[0], weights[-2], biases[-2], weights[-1], biases[-1], y,
            rows, widths[0], widths[1], widths[-1], channels, height * width,
            p.stride(0), p.stride(3), q.stride(0), q.stride(3),
            THREE=len(widths) == 3, BLOCK_0=blocks[0], BLOCK_1=blocks[1], BLOCK_2=blocks[-1],
            BLOCK_R=block_r, BLOCK_N=32, num_stages=1,
        )  # fmt: skip
    return y


@torch.library.custom_op("hornet::depthwise", mutates_args=())
def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return _depthwise_run(x, weight, flipped=False)


@torch.library.custom_op("hornet::depthwise_backward", mutates_args=())
def _depthwise_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    g = g if not reason_against(g) else g.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    of_x = _depthwise_run(g, weight, flipped=True)
    rows = batch * height
    parts = min(rows, 64)  # summed afterwards, in a fixed order
    out = x.new_empty(parts, kernel, kernel, channels, dtype=torch.float32)
    block_c = _power_of_two(channels, 32)
    with torch.cuda.device_of(x):
        _depthwise_weight_kernel[(parts, kernel, triton.cdiv(channels, block_c))](
            x, g, out, rows, height, width, channels, x.stride(0), x.stride(3), g.stride(0),
            g.stride(3), triton.cdiv(rows, parts),
            K=kernel, BLOCK_K=triton.next_power_of_2(kernel), BLOCK_W=8, BLOCK_C=block_c,
        )  # fmt: skip
    return of_x, out.sum(0).permute(2, 0, 1)[:, None].to(weight.dtype).contiguous()


@torch.library.custom_op("hornet::spectral", mutates_args=())
def _spectral(x: Tensor, planes: Tensor) -> Tensor:
    return _spectral_run(x, planes, *_transforms(*x.shape[2:], x.device))


@torch.library.custom_op("hornet::spectral_backward", mutates_args=())
def _spectral_backward(g: Tensor, x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    g = g if not reason_against(g) else g.contiguous(memory_format=torch.channels_last)
    analysis, synthesis = _transforms(*x.shape[2:], x.device)
    # the transposed function: transforms swapped, filter conjugated
    conjugated = torch.stack((planes[0], -planes[1]))
    of_x = _spectral_run(g, conjugated, synthesis, analysis).to(x.dtype)
    x_bpc, g_bpc = (t.float().permute(0, 2, 3, 1).flatten(1, 2) for t in (x, g))
    of_real, of_imag = torch.matmul(analysis[:, None], x_bpc)
    to_real, to_imag = torch.matmul(synthesis[:, None], g_bpc)
    real = (of_real * to_real + of_imag * to_imag).sum(0)
    imag = (of_real * to_imag - of_imag * to_real).sum(0)
    return of_x, torch.stack((real, imag))


def _spectral_run(x: Tensor, planes: Tensor, analysis: Tensor, synthesis: Tensor) -> Tensor:
    y = _map_like(x, torch.float32)
    batch, channels, height, width = x.shape
    pixels = height * width
    block_p, block_c = _power_of_two(pixels, MOST_PIXELS), 32
    with torch.cuda.device_of(x):
        _spectral_kernel[(batch, triton.cdiv(channels, block_c))](
            x, planes, analysis, synthesis, y, pixels, planes.shape[1], channels,
            x.stride(0), x.stride(3),
            BLOCK_P=block_p, BLOCK_F=16, BLOCK_C=block_c,
            num_stages=1, num_warps=8 if block_p > 64 else 4,
        )  # fmt: skip
    return y


@cache
def _transforms(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(2, F, P) each: the real and imaginary part of rfft2 as matrices, and irfft2's transposed."""
    pixels, frequencies = height * width, height * (width // 2 + 1)
    units = torch.eye(pixels, dtype=torch.float64).reshape(pixels, height, width)
    spectrum = torch.fft.rfft2(units, norm="ortho").flatten(1).t()
    forward = torch.stack((spectrum.real, spectrum.imag))
    lines = torch.eye(frequencies, dtype=torch.complex128).reshape(frequencies, height, -1)
    inverse = torch.fft.irfft2(
        torch.stack((lines, 1j * lines)), s=(height, width), norm="ortho"
    ).flatten(2)
    return tuple(m.float().contiguous().to(device) for m in (forward, inverse))  # type: ignore


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_depthwise.register_autograd(
    lambda ctx, g: _depthwise_backward(g, *ctx.saved_tensors), setup_context=_save
)
_spectral.register_autograd(
    lambda ctx, g: _spectral_backward(g, *ctx.saved_tensors), setup_context=_save
)

_norm_linear.register_fake(lambda x, weight, *_: _map_like(x, weight.dtype, len(weight)))
_gated_projection.register_fake(
    lambda p, q, weights, biases: _map_like(p, weights[-1].dtype, len(weights[-1]))
)
_depthwise.register_fake(lambda x, weight: _map_like(x, x.dtype))
_depthwise_backward.register_fake(
    lambda g, x, weight: (_map_like(x, x.dtype), torch.empty_like(weight))
)
_spectral.register_fake(lambda x, planes: _map_like(x, torch.float32))
_spectral_backward.register_fake(
    lambda g, x, planes: (_map_like(x, x.dtype), torch.empty_like(planes))
)
