"""The Triton kernels, without a GPU run by Triton's interpreter, against PyTorch's operators."""

import logging
import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import models  # noqa: F401 - registers the HorNets with timm
from models.ops import kernels
from models.ops.global_filter import filter_by_fft
from tests.unit.test_models_fast import assert_near

pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def channels_last_slice(batch, channels, height, width, dtype) -> torch.Tensor:
    """What proj_in gives the mixer: some channels of a wider map."""
    torch.manual_seed(0)
    whole = torch.randn(batch, channels + 3, height, width, dtype=dtype, device=DEVICE)
    return whole.to(memory_format=torch.channels_last)[:, 3:].requires_grad_()


def results(function, x, *parameters):
    """The result, and its gradients by all of them."""
    inputs = [parameter.to(DEVICE).requires_grad_() for parameter in parameters]
    y = function(x, *inputs)
    torch.manual_seed(1)
    direction = torch.randn(y.shape).to(DEVICE)
    gradients = torch.autograd.grad((y.float() * direction).sum(), [x, *inputs])
    return [y, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 20, 3, 5), (1, 5, 2, 18), (1, 33, 3, 1)])
@pytest.mark.parametrize("kernel", [7, 3])
def test_depthwise_convolution(shape, dtype, kernel):
    x = channels_last_slice(*shape, dtype)
    parameters = torch.randn(shape[1], 1, kernel, kernel), torch.randn(shape[1])
    ours = results(kernels.depthwise_conv, x, *parameters)
    exact = results(
        lambda x, w, b: F.conv2d(x.float(), w, b, padding=kernel // 2, groups=len(w)),
        x,
        *parameters,
    )
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for actual, expected in zip(ours, exact, strict=True):
        assert_near(actual.float(), expected.float(), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 7), (6, 8), (14, 14), (5, 3), (1, 1)])
def test_global_filter(size, dtype):
    x = channels_last_slice(2, 5, *size, dtype)
    weight = torch.randn(5, 6, 4, 2)  # of another size than the maps want
    ours = results(kernels.filter_by_kernel, x, weight)
    exact = results(lambda x, w: filter_by_fft(x.float(), w), x, weight)
    for actual, expected in zip(ours, exact, strict=True):
        assert_near(actual.float(), expected.float(), 1e-5 if dtype == torch.float32 else 1e-2)


def test_operators_are_registered_soundly():
    """Their fake versions, strides and gradients, as torch.compile will take them."""
    x = channels_last_slice(1, 4, 5, 6, torch.float32)
    weight = torch.randn(4, 1, 3, 3, device=DEVICE, requires_grad=True)
    planes = torch.randn(2, 20, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels._depthwise, (x, weight))
    torch.library.opcheck(kernels._spectral, (x, planes))


def test_the_network_takes_them(monkeypatch):
    model = timm.create_model("hornet_atto_gf", base_dim=16, depths=(1, 1, 1, 1), num_classes=3)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    calls = []
    for name in ("_depthwise", "_spectral"):
        operator = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=operator: calls.append(f) or f(*a))
    model.set_triton()
    logits = model(x)
    logits.sum().backward()
    assert len(calls) == 4  # stages 0 and 1, stages 2 and 3
    assert_near(logits, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert_near(parameter.grad, gradient, 1e-4)
    model.set_triton(False)
    assert model(x).shape == (1, 3)
    assert len(calls) == 4


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter")
def test_what_they_cannot_take_runs_otherwise_and_says_why(monkeypatch, caplog):
    kernels._log_once.cache_clear()
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3, 3)
    with caplog.at_level(logging.WARNING):
        y = kernels.depthwise_conv(x, weight, None)
        kernels.depthwise_conv(x, weight, None)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        kernels.depthwise_conv(x, weight, None)
        monkeypatch.setattr(kernels, "triton", None)
        kernels.filter_by_kernel(x, torch.randn(4, 5, 4, 2))
    assert torch.equal(y, F.conv2d(x, weight, padding=1, groups=4))
    assert [record.message for record in caplog.records] == [
        "the depthwise convolution runs on PyTorch's operators: the map is not channels last",
        "the depthwise convolution runs on PyTorch's operators: Triton does not run on cpu",
        "the global filter runs on PyTorch's operators: Triton is not installed",
    ]


def test_large_maps_are_left_to_the_fft(caplog):
    kernels._log_once.cache_clear()
    x = channels_last_slice(1, 2, 17, 16, torch.float32)
    weight = torch.randn(2, 17, 9, 2, device=DEVICE)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kernels.filter_by_kernel(x, weight), filter_by_fft(x, weight))
    assert "maps of more than 256 pixels" in caplog.text


COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.ops import kernels

def compile(function, capability, pointers, constants, **options):
    signature = dict.fromkeys(function.arg_names, "i32") | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    known = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=known)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    print(function.__name__, compiled.metadata.shared)

for capability in (80, 90):
    for kind in ("*fp32", "*bf16", "*fp16"):
        maps = {"x": kind, "y": kind, "weight": "*fp32"}
        sizes = {"K": 7, "FLIPPED": True, "BLOCK_W": 16, "BLOCK_C": 32}
        compile(kernels._depthwise_kernel, capability, maps, sizes)
    maps = {"x": "*bf16", "g": "*bf16", "out": "*fp32"}
    sizes = {"K": 7, "BLOCK_K": 8, "BLOCK_W": 8, "BLOCK_C": 32}
    compile(kernels._depthwise_weight_kernel, capability, maps, sizes)
    for pixels in (64, 256):
        maps = {"x": "*bf16"} | dict.fromkeys(("planes", "analysis", "synthesis", "y"), "*fp32")
        sizes = {"BLOCK_P": pixels, "BLOCK_F": 16, "BLOCK_C": 32}
        compile(kernels._spectral_kernel, capability, maps, sizes, num_stages=1, num_warps=8)
"""


@pytest.mark.slow
def test_they_compile_for_gpus_and_fit_into_their_memory():
    """Triton needs no GPU for that. The smaller one here, an A100, has 163 KB a program."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILATION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 12
    assert max(shared) < 163 * 1024
