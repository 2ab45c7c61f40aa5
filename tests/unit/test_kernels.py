"""The Triton kernels, without a GPU run by Triton's interpreter, against PyTorch's operators."""

import logging
import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.utils import reparameterize_model
from torch import nn

import models
from models.fast import triton_kernels as kernels
from models.gnconv import GnConv
from models.layers import fold_norm
from models.spectral import spectral_filter
from tests.unit.test_models_fast import assert_near

pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies matrices of bfloat16 wrongly: it takes their bits for integers
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


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


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
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


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("size", [(7, 7), (6, 8), (14, 14), (5, 3), (1, 1)])
def test_global_filter(size, dtype):
    x = channels_last_slice(2, 5, *size, dtype)
    weight = torch.randn(5, 6, 4, 2)  # of another size than the maps want
    ours = results(kernels.filter_by_kernel, x, weight)
    exact = results(lambda x, w: spectral_filter(x, w), x, weight)
    for actual, expected in zip(ours, exact, strict=True):
        assert_near(actual.float(), expected.float(), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_norm_with_proj_in(dtype, affine):
    torch.manual_seed(0)
    norm = LayerNorm2d(40, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = nn.Conv2d(40, 70, 1)
    if not affine:
        fold_norm(norm, layer)
        assert norm.weight is None
    norm, layer = norm.to(DEVICE), layer.to(DEVICE)
    x = 3 + 2 * torch.randn(2, 40, 5, 7, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, HALF, enabled=dtype == HALF):
        y = kernels.norm_linear(x, norm, layer)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y.float(), layer(norm(x)), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(HALF, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("order", "channels", "dim_ratio"),
    [
        (2, 24, 1),
        (3, 48, 1),
        (2, 24, 2),
        pytest.param(3, 128, 1, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_gated_recursion_with_proj_out(order, channels, dim_ratio, dtype):
    torch.manual_seed(0)
    width = dim_ratio * channels
    layer = GnConv(channels, order=order, dim_ratio=dim_ratio).to(DEVICE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=channels**-0.5)
    x = torch.randn(1, 2 * width, 5, 7, device=DEVICE).to(memory_format=torch.channels_last)
    expected = models.accelerate(layer).recursion(x)
    models.accelerate(layer, triton=True)
    with torch.autocast(DEVICE, HALF, enabled=dtype == HALF):
        y = layer.recursion(x.to(dtype))
    assert y.dtype == dtype
    assert_near(y.float(), expected, 1e-5 if dtype == torch.float32 else 4e-2)


def test_operators_are_registered_soundly():
    """Their fake versions, strides and gradients, as torch.compile will take them."""
    x = channels_last_slice(1, 4, 5, 6, torch.float32)
    weight = torch.randn(4, 1, 3, 3, device=DEVICE, requires_grad=True)
    planes = torch.randn(2, 20, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels._depthwise, (x, weight))
    torch.library.opcheck(kernels._spectral, (x, planes))
    x = x.detach()
    matrix, bias = torch.randn(6, 4, device=DEVICE), torch.randn(6, device=DEVICE)
    torch.library.opcheck(kernels._norm_linear, (x, matrix, bias, None, None, 1e-6))
    weights = [torch.randn(8, 4, device=DEVICE), torch.randn(8, 8, device=DEVICE)]
    biases = [torch.randn(8, device=DEVICE)] * 2
    q = channels_last_slice(1, 12, 5, 6, torch.float32).detach()
    torch.library.opcheck(kernels._gated_projection, (x, q, weights, biases))


@pytest.mark.slow
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
    models.accelerate(model, triton=True)
    logits = model(x)
    logits.sum().backward()
    assert len(calls) == 2 + 2 * 2  # stages 0 and 1; both halves of stages 2 and 3
    assert_near(logits, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert_near(parameter.grad, gradient, 1e-4)
    for name in ("_norm_linear", "_gated_projection"):
        operator = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=operator: calls.append(f) or f(*a))
    with torch.no_grad():
        assert_near(model.eval()(x), expected)
        assert len(calls) == 6 + 6 + 4 + 2  # norms, and the recursions of orders 2 and 3
        assert_near(reparameterize_model(model)(x), expected)
    calls.clear()
    models.accelerate(model)
    assert model(x).shape == (1, 3)
    assert not calls


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter")
def test_what_they_cannot_take_runs_otherwise_and_says_why(monkeypatch, caplog):
    kernels._log.cache_clear()
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


@pytest.mark.slow
def test_layer_scale_and_hooks_are_heeded(monkeypatch):
    """In training mode without gradients, as batch norms are estimated; with features hooked."""
    model = timm.create_model("hornet_atto_7x7", base_dim=16, depths=(1, 1, 1, 1), num_classes=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
        models.accelerate(model, triton=True)
        assert_near(model(x), expected)
        model.eval()
        seen = []
        block = model.stages[0][0]
        for layer in (block.norm1, block.gnconv.proj_in, block.gnconv.proj_out):
            layer.register_forward_hook(lambda layer, *_: seen.append(layer))
        model(x)
        assert seen == [block.norm1, block.gnconv.proj_in, block.gnconv.proj_out]


def test_an_empty_batch_and_double_precision():
    x = torch.randn(0, 4, 5, 6, device=DEVICE).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 1, 3, 3, device=DEVICE, requires_grad=True)
    kernels.depthwise_conv(x, weight, None).sum().backward()
    assert not weight.grad.any()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, device=DEVICE)
    filtered = kernels.filter_by_kernel(x, torch.randn(4, 4, 3, 2, device=DEVICE))
    assert filtered.dtype == torch.float64


def test_falling_back_breaks_no_graph():
    model = timm.create_model("hornet_atto_7x7", base_dim=16, depths=(1, 1, 1, 1), num_classes=3)
    models.accelerate(model, triton=True)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)  # which no kernel takes
    torch.compiler.reset()
    compiled = torch.compile(model.double().eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(compiled(x), model(x))


def test_large_maps_are_left_to_the_fft(caplog):
    kernels._log.cache_clear()
    x = channels_last_slice(1, 2, 17, 16, torch.float32)
    weight = torch.randn(2, 17, 9, 2, device=DEVICE)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kernels.filter_by_kernel(x, weight), spectral_filter(x, weight))
    assert "maps of more than 256 pixels" in caplog.text


COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.fast import triton_kernels as kernels

def compile(function, capability, pointers, constants, **options):
    signature = dict.fromkeys(function.arg_names, "i32") | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    known = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=known)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    print(function.__name__, compiled.metadata.shared)

for capability in (80, 86, 90):
    for kind in ("*fp32", "*bf16", "*fp16"):
        maps = {"x": kind, "y": kind, "weight": "*fp32"}
        sizes = {"K": 7, "FLIPPED": True, "BLOCK_W": 16, "BLOCK_C": 32}
        compile(kernels._depthwise_kernel, capability, maps, sizes)
    maps = {"x": "*bf16", "g": "*bf16", "out": "*fp32"}
    sizes = {"K": 7, "BLOCK_K": 8, "BLOCK_W": 8, "BLOCK_C": 32}
    compile(kernels._depthwise_weight_kernel, capability, maps, sizes)
    for kind, wide in (("*fp32", 128), ("*bf16", 256)):
        maps = dict.fromkeys(("weight", "bias", "y"), kind) | {"eps": "fp32"}
        maps |= dict.fromkeys(("x", "scale", "shift"), "*fp32")
        sizes = {"AFFINE": True, "BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_C": 32}
        compile(kernels._norm_linear_kernel, capability, maps, sizes)
        maps = dict.fromkeys(("p", "q", "w_1", "b_1", "w_2", "b_2", "w_out", "b_out", "y"), kind)
        sizes = {"THREE": True, "BLOCK_R": 32, "BLOCK_0": wide // 4}
        sizes |= {"BLOCK_1": wide // 2, "BLOCK_2": wide}
        compile(kernels._gated_kernel, capability, maps, sizes | {"BLOCK_N": 32}, num_stages=1)
    for pixels in (64, 256):
        maps = {"x": "*bf16"} | dict.fromkeys(("planes", "analysis", "synthesis", "y"), "*fp32")
        sizes = {"BLOCK_P": pixels, "BLOCK_F": 16, "BLOCK_C": 32}
        compile(kernels._spectral_kernel, capability, maps, sizes, num_stages=1, num_warps=8)
"""


@pytest.mark.slow
def test_they_compile_for_gpus_and_fit_into_their_memory():
    """Triton needs no GPU for that. The smallest ones served have 99 KB a program."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILATION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 30
    assert max(shared) <= 99 * 1024, done.stdout
