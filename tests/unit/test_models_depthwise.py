"""The depthwise convolution's fast gradients against PyTorch's, in double precision."""

import pytest
import torch
import torch.nn.functional as F

from models.fast import depthwise as ops
from models.fast.depthwise import depthwise
from tests.unit.test_models_fast import assert_near

needs_avx512 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="the fast gradients are for AVX512",
)


def tensors(shape, kernel, dtype):
    torch.manual_seed(0)
    batch, channels, height, width = shape
    wide = torch.randn(batch, channels + 3, height, width, dtype=dtype)
    x = wide.to(memory_format=torch.channels_last)[:, 3:]  # as it is cut from proj_in's output
    return [x, torch.randn(channels, 1, kernel, kernel), torch.randn(channels)]


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 9), (7, 7), (14, 13), (40, 33)])
def test_gradients(size, kernel, dtype, monkeypatch):
    inputs = [t.requires_grad_() for t in tensors((3, 20, *size), kernel, dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    calls = []
    monkeypatch.setattr(ops._Depthwise, "apply", lambda *a: calls.append(a) or apply(*a))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = depthwise(*inputs)
    expected = F.conv2d(*exact, padding=kernel // 2, groups=20)
    direction = torch.randn(y.shape, dtype=torch.float64)
    ours = torch.autograd.grad((y.double() * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), exact)
    assert calls
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    share = 1e-5 if dtype == torch.float32 else 2e-2
    for actual, wanted in zip((y, *ours), (expected, *theirs), strict=True):
        assert_near(actual, wanted, share)


apply = ops._Depthwise.apply


@needs_avx512
@pytest.mark.parametrize("kernel", [3, 7])
def test_second_derivatives(kernel):
    results = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            inputs = [t.requires_grad_() for t in tensors((2, 4, 5, 6), kernel, torch.float32)]
            y = depthwise(*inputs)
            assert ("_Depthwise" in type(y.grad_fn).__name__) == enabled
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@needs_avx512
def test_only_what_is_wanted_is_computed(monkeypatch):
    x, weight, bias = tensors((2, 4, 8, 8), 7, torch.float32)
    done = []
    gradient = ops._weight_gradient
    monkeypatch.setattr(ops, "_weight_gradient", lambda *a: done.append("weight") or gradient(*a))
    monkeypatch.setattr(ops._Depthwise, "apply", lambda *a: done.append("x") or apply(*a))
    depthwise(x, weight, bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 128.0))
    assert done == ["x"]  # the forward pass
    depthwise(x, weight.requires_grad_(), None).sum().backward()
    assert done == ["x", "x", "weight"]
    depthwise(x.requires_grad_(), weight.detach(), None).sum().backward()
    assert done == ["x", "x", "weight", "x", "x"]
    with torch.no_grad():
        assert depthwise(x, weight, bias).grad_fn is None


def test_what_pytorch_decides():
    x, weight, _ = tensors((2, 4, 8, 8), 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise(x.double(), weight.double(), None).dtype == torch.float64
    with pytest.raises(RuntimeError):
        depthwise(x, weight.double(), None)
    empty = x[:0].requires_grad_()
    depthwise(empty, weight, None).sum().backward()
    assert empty.grad.shape == empty.shape


def test_forward_mode():
    x, weight, _ = tensors((2, 4, 8, 8), 7, torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = depthwise(dual, weight.requires_grad_(), None)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert_near(tangent, F.conv2d(torch.ones_like(x), weight, padding=3, groups=4))
