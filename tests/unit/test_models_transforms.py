"""The models under torch's transforms: copies, traces, scripts, exports, compilers, torch.func."""

import copy
import io
import shutil

import pytest
import timm
import torch
from torch.func import functional_call, grad, vmap

import models  # noqa: F401 - registers the models
from tests.golden.formula import fill_by_formula

CASES = [("hornet_atto_7x7", "fft"), ("hornet_atto_gf", "fft"), ("hornet_atto_gf", "matmul")]
OTHER_SIZES = [(96, 160), (128, 64), (224, 224)]


@pytest.fixture(params=CASES, ids=["7x7", "gf-fft", "gf-matmul"])
def model(request):
    name, impl = request.param
    model = timm.create_model(
        name, base_dim=16, depths=(1, 1, 1, 1), num_classes=10, global_filter_impl=impl
    )
    return fill_by_formula(model).eval().requires_grad_(False)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same_at_other_sizes(function, model):
    for height, width in OTHER_SIZES:
        images = torch.randn(2, 3, height, width)
        assert_same(function(images), model(images))


def test_deepcopy_and_pickle(model, x):
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_symbolic_trace(model, x):
    traced = torch.fx.symbolic_trace(model)
    assert_same(traced(x), model(x))
    assert_same_at_other_sizes(traced, model)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(model, x):
    traced = torch.jit.trace(model, x)
    assert_same(traced(x), model(x))
    assert_same_at_other_sizes(traced, model)


@pytest.mark.filterwarnings("ignore")
def test_jit_script(model, x):
    scripted = torch.jit.script(model)
    assert_same(scripted(x), model(x))
    assert_same_at_other_sizes(scripted, model)


@pytest.mark.filterwarnings("ignore")
def test_jit_script_of_features():
    model = timm.create_model("hornet_atto_gf", base_dim=16, depths=(1, 1, 1, 1),
                              features_only=True).eval()  # fmt: skip
    images = torch.randn(1, 3, 64, 96)
    for actual, expected in zip(torch.jit.script(model)(images), model(images), strict=True):
        assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_export_with_dynamic_height_and_width(model, x):
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dynamic,))
    targets = " ".join(str(node.target) for node in exported.graph.nodes)
    uses_matmul = any(getattr(m, "impl", "") == "matmul" for m in model.modules())
    if uses_matmul:
        assert "fft" not in targets
        assert "view_as_complex" not in targets
    exported_model = exported.module()
    assert_same(exported_model(x), model(x))
    assert_same_at_other_sizes(exported_model, model)


def test_per_sample_gradients(model, x):
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = grad(loss)(parameters, image)
        for name, gradient in expected.items():
            error = (gradients[name][i] - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-4, name


def test_ensemble(model, x):
    """vmap over the parameters of several models."""
    stacked = {name: torch.stack((p, 0.9 * p)) for name, p in model.named_parameters()}
    outputs = vmap(lambda p: functional_call(model, p, (x,)))(stacked)
    assert_same(outputs[0], model(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's CPU backend needs g++")
@pytest.mark.filterwarnings("ignore")
def test_compile(model, x):
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(x), model(x))


def test_compile_captures_one_graph(model, x):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(x), model(x))


@pytest.mark.slow
def test_compile_captures_one_graph_for_any_size(model, x):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    assert_same(compiled(x), model(x))
    images = torch.randn(1, 3, 96, 128)
    assert_same(compiled(images), model(images))
