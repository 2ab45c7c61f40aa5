"""The global filter: its definition in numpy, its two implementations, sizes and precisions."""

import copy

import numpy as np
import pytest
import torch

from models import GlobalLocalFilter, set_global_filter_impl
from models.spectral import IMPLEMENTATIONS, resize_filter, spectral_filter

SIZES = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (5, 5), (6, 9), (7, 7), (14, 14), (13, 24)]


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def resize_by_definition(weight: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with aligned corners: output i reads position i (n_in - 1) / (n_out - 1)."""

    def along(array, axis, size):
        n = array.shape[axis]
        position = np.arange(size) * (n - 1) / max(size - 1, 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, n - 1)
        shape = [1] * array.ndim
        shape[axis] = size
        part = (position - low).reshape(shape)
        return array.take(low, axis) * (1 - part) + array.take(high, axis) * part

    return along(along(weight, 1, height), 2, width)


def filter_by_definition(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    height, width = x.shape[2:]
    weight = resize_by_definition(weight, height, width // 2 + 1)
    spectrum = np.fft.rfft2(x, norm="ortho") * (weight[..., 0] + 1j * weight[..., 1])
    return np.fft.irfft2(spectrum, s=(height, width), norm="ortho")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_definition(impl, size):
    """Random filters, so not Hermitian in the columns of DC and Nyquist; some are resized."""
    torch.manual_seed(0)
    for filter_size in ((size[0], size[1] // 2 + 1), (7, 4)):
        x, weight = random(2, 3, *size), random(3, *filter_size, 2)
        actual = spectral_filter(x, weight, impl).numpy()
        expected = filter_by_definition(x.numpy(), weight.numpy())
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_circular_convolution(impl):
    """The spectrum of a real kernel filters as the sum over circular shifts."""
    torch.manual_seed(0)
    x, kernel = random(1, 2, 5, 6), random(2, 5, 6)
    expected = torch.zeros_like(x)
    for i in range(5):
        for j in range(6):
            shifted = x.roll((i, j), dims=(2, 3))
            expected += shifted * kernel[:, i, j, None, None]
    weight = torch.view_as_real(torch.fft.rfft2(kernel))
    torch.testing.assert_close(spectral_filter(x, weight, impl), expected)
    torch.testing.assert_close(spectral_filter(x, weight, impl, resize=False), expected)


@pytest.mark.parametrize("size", SIZES)
def test_matmul_equals_fft(size):
    """Outputs and gradients; 1e-5 of the largest in float32, 1e-12 in float64."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = random(2, 4, *size, dtype=dtype).requires_grad_()
        weight = random(4, 9, 5, 2, dtype=dtype).requires_grad_()
        out = random(2, 4, *size, dtype=dtype)
        results = []
        for impl in IMPLEMENTATIONS:
            y = spectral_filter(x, weight, impl)
            assert y.dtype == dtype
            results.append((y.detach(), *torch.autograd.grad(y, (x, weight), out)))
        for expected, actual in zip(*results, strict=True):
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error < tolerance


def test_resize():
    torch.manual_seed(0)
    weight = random(2, 14, 8, 2)
    for size in ((24, 13), (7, 4), (1, 1), (14, 8), (9, 30)):
        expected = resize_by_definition(weight.numpy(), *size)
        actual = resize_filter(weight, *size).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(resize_filter(weight, 14, 8), weight)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_layer_by_definition(kernel_size):
    """Norm, halves, depthwise convolution beside global filter, interleaved, norm."""
    torch.manual_seed(0)
    options = {} if kernel_size == 3 else {"kernel_size": kernel_size}
    layer = GlobalLocalFilter(6, h=4, w=3, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()

    def norm(x, module):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
        return x * weight[:, None, None] + bias[:, None, None]

    x = random(2, 6, 5, 4)
    normed = norm(x.numpy(), layer.pre_norm)
    local = torch.nn.functional.conv2d(
        torch.from_numpy(normed[:, :3]), layer.dw.weight, padding=kernel_size // 2, groups=3
    )
    mixed = np.empty_like(normed)
    mixed[:, 0::2] = local.detach().numpy()
    mixed[:, 1::2] = filter_by_definition(normed[:, 3:], layer.complex_weight.detach().numpy())
    expected = norm(mixed, layer.post_norm)
    for impl in ("fft", "matmul"):
        layer.set_impl(impl)
        actual = layer(x).detach().numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", ["fft", "matmul"])
@pytest.mark.parametrize("side", [7, 14])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(impl, side, dtype):
    torch.manual_seed(0)
    layer = GlobalLocalFilter(16, h=14, w=8, impl=impl)
    x = torch.randn(2, 16, side, side)
    expected = layer(x).detach()
    half = copy.deepcopy(layer).to(dtype)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in half.parameters())
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    assert (y.float() - expected).abs().max() < tolerance


@pytest.mark.parametrize("impl", ["fft", "matmul"])
@pytest.mark.parametrize("side", [7, 14])
def test_autocast(impl, side):
    torch.manual_seed(0)
    layer = GlobalLocalFilter(16, h=14, w=8, impl=impl)
    x = torch.randn(2, 16, side, side)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert torch.isfinite(layer.complex_weight.grad).all()
    assert (y.float() - expected).abs().max() < 0.1


def test_autocast_leaves_the_transform_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 7, 7), torch.randn(4, 7, 4, 2)
    expected = spectral_filter(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        for impl in IMPLEMENTATIONS:
            y = spectral_filter(x, weight, impl)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_choice_of_implementation():
    layers = torch.nn.Sequential(GlobalLocalFilter(4, 4, 3), torch.nn.ReLU())
    set_global_filter_impl(layers, "matmul")
    assert layers[0].impl == "matmul"
    with pytest.raises(ValueError, match="unknown global filter implementation 'dct'"):
        set_global_filter_impl(layers, "dct")
    assert layers[0].impl == "matmul"
