"""Fast paths of the models against a plain HorNet, forward and gradients."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

import models
from benchmarks.measure import kept_bytes, peak_bytes
from benchmarks.plain_hornet import PlainHorNet
from models.fast import layers
from models.fast import pointwise as ops
from models.fast.pointwise import onednn_serves, pointwise
from tests.golden.formula import fill_by_formula, formula_input

GOLDEN = Path(__file__).parents[1] / "golden"
FILTERS = {"7x7": (None,) * 4, "gf": (None, None, (8, 5), (3, 2))}
SIZES = [(64, 64), (70, 101), (32, 96)]
MEMORY = ("normal", "lean")

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@pytest.fixture(params=["7x7", "gf"])
def pair(request):
    """(ours, accelerated, and an independent plain one), of the same weights."""
    filters = FILTERS[request.param]
    plain = fill_by_formula(PlainHorNet(16, filters, num_classes=7, depths=(1, 2, 1, 1)))
    ours = models.HorNet(
        base_dim=16, depths=(1, 2, 1, 1), num_classes=7, global_filters=filters
    ).to(memory_format=torch.channels_last)
    ours.load_state_dict(plain.state_dict())
    return models.accelerate(ours), plain


def assert_near(actual, expected, share=2e-5):
    largest = expected.abs().max()
    assert (actual - expected).abs().max() <= share * largest, (actual - expected).abs().max()


@pytest.mark.parametrize("name", ["hornet_tiny_7x7_224x224", "hornet_tiny_gf_192x256"])
def test_the_plain_network_is_the_released_one(name):
    height, width = map(int, name.rpartition("_")[2].split("x"))
    filters = (None, None, (14, 8), (7, 4)) if "gf" in name else (None,) * 4
    plain = fill_by_formula(PlainHorNet(64, filters)).eval()
    with torch.no_grad():
        logits = plain(formula_input(2, height, width))
    assert_near(logits, torch.from_numpy(np.load(GOLDEN / f"{name}.npz")["logits"]))


def test_conversion_and_back(pair):
    """Names, order and values of the weights stay; plain() gives every layer its class back."""
    ours = models.plain(pair[0])
    classes = [type(layer) for layer in ours.modules()]
    weights = {name: value.clone() for name, value in ours.state_dict().items()}
    x = formula_input(2, 64, 64)
    with torch.no_grad():
        expected = ours.eval()(x)
    for memory in MEMORY:
        assert models.accelerate(ours, memory=memory) is ours
        swapped = {type(layer) for layer in ours.modules()}
        assert (layers.LeanBlock in swapped) == (memory == "lean")
        assert not swapped & {models.Block, models.GnConv, models.GlobalLocalFilter}
        assert list(ours.state_dict()) == list(weights)
        assert all(torch.equal(value, weights[n]) for n, value in ours.state_dict().items())
        with torch.no_grad():
            assert_near(ours(x), expected)
    assert [type(layer) for layer in models.plain(ours).modules()] == classes
    with torch.no_grad():
        assert torch.equal(ours(x), expected)


def test_only_known_layers_are_converted():
    class OwnConv(models.GnConv):
        pass

    reflecting = nn.Conv2d(28, 28, 3, padding=1, groups=28, padding_mode="reflect")
    net = nn.Sequential(
        OwnConv(16, order=3, mixer=lambda _: reflecting), nn.Conv2d(16, 8, 1), nn.GELU()
    )
    x = torch.randn(1, 16, 8, 8)
    expected = net(x)
    models.accelerate(net)
    assert type(net[0]) is OwnConv
    assert type(net[0].proj_in) is layers.PointwiseConv
    assert type(reflecting) is type(net[1]) is nn.Conv2d
    assert_near(net(x), expected)
    with pytest.raises(ValueError, match="memory 'less': choose one of normal, lean"):
        models.accelerate(net, memory="less")


def test_layers_with_backward_hooks_stay(pair):
    ours = models.plain(pair[0])
    block = ours.stages[2][0]
    seen = []
    block.pwconv1.register_full_backward_hook(lambda *arguments: seen.append(arguments[2][0]))
    x = formula_input(2, 64, 64)
    ours(x).sum().backward()
    models.accelerate(ours)(x).sum().backward()
    assert type(block.pwconv1) is models.layers.ChannelLinear
    assert_near(seen[1], seen[0])


def test_classes_derived_from_fast_ones_stay(pair):
    """weight_norm gives a layer a class of its own, which computes its weight."""
    ours, _ = pair
    layer = ours.stages[0][0].gnconv.proj_in
    nn.utils.parametrizations.weight_norm(layer)
    x = formula_input(2, 64, 64)
    with torch.no_grad():
        expected = ours.eval()(x)
        assert_near(models.plain(ours)(x), expected)
        assert_near(models.accelerate(ours, "lean")(x), expected)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("proj_out", [True, False])
def test_width_of_the_recursion(proj_out, memory):
    """Outputs and gradients stay those of the plain layer, alone and inside a block."""
    torch.manual_seed(0)
    layer = models.GnConv(8, order=3, scale=1 / 3, dim_ratio=2, proj_out=proj_out)
    block = models.Block(8, order=2, layer_scale_init_value=0.5)
    block.gnconv = models.GnConv(
        8, order=2, scale=1 / 3, dim_ratio=2 if proj_out else 1, proj_out=proj_out
    )
    results = []
    for accelerated in (False, True):
        net = nn.Sequential(block, layer).train()
        if accelerated:
            models.accelerate(net, memory)
            assert type(layer) is type(block.gnconv) is layers.FastGnConv
            assert (type(layer.proj_out) is layers.PointwiseConv) == proj_out
        x = formula_input(2, 9, 11, channels=8).requires_grad_()
        net.zero_grad()
        y = net(x)
        assert y.shape == (2, 8 if proj_out else 16, 9, 11)
        y.square().sum().backward()
        with torch.no_grad():
            folded = reparameterize_model(net.eval())(x)
        assert_near(folded, y)
        results.append([y.detach(), x.grad, *(p.grad for p in net.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert_near(fast, plain, 1e-4)
    assert type(models.plain(net)[1]) is models.GnConv


@pytest.mark.parametrize("how", ["trace", "export"])
def test_recorded_for_any_size(pair, how):
    ours = pair[0].eval()
    example, other = formula_input(2, 128, 128), formula_input(2, 96, 160)
    with torch.no_grad():
        expected = ours(other)
        if how == "trace":
            recorded = torch.jit.trace(ours, example, check_trace=False)
        else:
            dims = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
            recorded = torch.export.export(ours, (example,), dynamic_shapes=dims).module()
        assert_near(recorded(other), expected)


@pytest.mark.parametrize("size", SIZES)
def test_evaluation(pair, size):
    ours, plain = (model.eval() for model in pair)
    x = formula_input(2, *size)
    with torch.no_grad():
        assert_near(ours(x), plain(x))
        assert_near(reparameterize_model(ours)(x), plain(x))


@pytest.mark.parametrize("size", SIZES)
def test_gradients(pair, size):
    gradients = []
    for model in pair:
        x = formula_input(2, *size).requires_grad_()
        model.train()(x).logsumexp(1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"x": x.grad})
    ours, plain = gradients
    for name, expected in plain.items():
        assert_near(ours[name], expected, 1e-4)


def test_mixed_precision(pair):
    ours, plain = pair
    x = formula_input(2, 64, 64)
    plain(x).logsumexp(1).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours.train()(x)
        with torch.no_grad():
            folded = reparameterize_model(ours.eval())(x)
    logits.float().logsumexp(1).sum().backward()
    assert_near(logits, plain(x), 3e-2)
    assert_near(folded, plain(x), 3e-2)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert error < 0.1, name


def test_an_initial_layer_scale_is_no_zero_in_float16(pair):
    """Times a weight it would be, and the first layers of a branch would not learn."""
    ours = pair[0].train()
    ours.init_weights()
    gradients = []
    for enabled in (True, False):
        ours.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            logits = ours(formula_input(2, 64, 64))
        (2.0**10 * logits.float().logsumexp(1).sum()).backward()  # scaled, as a GradScaler does
        gradients.append(ours.stages[3][0].pwconv1.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


@pytest.mark.slow
def test_training_compiles_as_one_graph(pair):
    ours = pair[0].train()
    x = formula_input(2, 64, 64)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert_near(compiled(x), ours(x), 1e-2 if dtype == torch.bfloat16 else 2e-5)


def test_folding_leaves_the_original_and_is_done_once(pair):
    ours = pair[0].eval()
    before = copy.deepcopy(ours.state_dict())
    folded = reparameterize_model(ours)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert not any("gamma" in name or ".norm1." in name for name in folded.state_dict())
    again = reparameterize_model(folded)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in folded.state_dict().items()
    )


@pytest.mark.parametrize("layer", ["proj_in", "dwconv", "proj_out", "pwconv1", "pwconv2"])
def test_a_layer_that_was_replaced(pair, layer):
    """What another layer adds to the output is scaled too, in training as in evaluation."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1

    ours = pair[0]
    for block in (block for stage in models.plain(ours).stages for block in stage):
        owner = block.gnconv if hasattr(block.gnconv, layer) else block
        setattr(owner, layer, Adapted(getattr(owner, layer)))
    x = formula_input(2, 64, 64)
    with torch.no_grad():
        expected = ours.eval()(x)
        assert_near(reparameterize_model(ours)(x), expected)
        models.accelerate(ours)
        assert_near(ours.train()(x), expected)
        assert_near(reparameterize_model(ours.eval())(x), expected)


def test_another_activation_is_not_folded(pair):
    ours = pair[0].eval()
    for block in (block for stage in ours.stages for block in stage):
        block.act = nn.ReLU()
    x = formula_input(2, 64, 64)
    with torch.no_grad():
        assert_near(reparameterize_model(ours)(x), ours(x))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["hornet_atto_7x7", "hornet_atto_gf"])
def test_lean_memory(name, dtype):
    """The same gradients to the last bit, drop path included, for half the memory."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.5, layer_scale_init_value=0.5)
    model = model.to(memory_format=torch.channels_last).train()
    assert type(model.stages[0][0]) is models.Block  # timm gives the plain network
    x = torch.randn(4, 3, 96, 96)

    def forward():
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(x)
        return logits.float().logsumexp(1).sum()

    gradients, kept = [], []
    for is_lean in (False, True):
        models.accelerate(model, memory=MEMORY[is_lean])
        loss = forward()
        for retain in (True, False):  # the second time, nothing is left of the first
            loss.backward(retain_graph=retain)
            gradients.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        kept.append(kept_bytes(forward, torch.device("cpu")))
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))
    # in half precision the residual stream, of 32 bits, weighs more
    assert kept[1] < (0.6 if dtype == torch.float32 else 0.75) * kept[0], kept


def test_a_lean_model_can_do_what_others_can(pair, tmp_path):
    ours = pair[0].eval()
    x = formula_input(2, 64, 64)
    expected = ours(x)
    models.accelerate(ours, memory="lean")
    torch.save(ours, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    scripted = torch.jit.script(models.plain(copy.deepcopy(ours)))
    for model in (saved, copy.deepcopy(ours), scripted):
        assert_near(model(x), expected)
    assert ours.to("meta")(x.to("meta")).shape == expected.shape


def test_lean_memory_costs_none_in_evaluation(pair):
    ours = pair[0].eval()
    peaks = []
    for is_lean in (False, True):
        models.accelerate(ours, memory=MEMORY[is_lean])
        with torch.no_grad():
            peaks.append(peak_bytes(lambda: ours(formula_input(2, 96, 96)), torch.device("cpu")))
    assert peaks[1] == peaks[0]


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.GELU(), nn.Dropout(0.5))


def double(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("part", ["dropout", "hook", "later hook", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_memory_leaves_alone_what_it_does_not_know(pair, part, dtype):
    ours = pair[0].train()
    for block in (block for stage in models.plain(ours).stages for block in stage):
        if part == "hook":
            block.norm1.register_forward_hook(double)
        elif part != "later hook":
            block.act = Noisy() if part == "dropout" else nn.ReLU(inplace=True)
    gradients = []
    for is_lean in (False, True):
        models.accelerate(ours, memory=MEMORY[is_lean])
        if part == "later hook":
            hooks = [s[0].norm1.register_forward_hook(double) for s in ours.stages]
        ours.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = ours(formula_input(2, 64, 64))
        logits.float().logsumexp(1).sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
        if part == "later hook":
            for hook in hooks:
                hook.remove()
    assert all(map(torch.equal, *gradients))


def test_lean_memory_with_other_weights(pair):
    """Those of the call count, also in the backward pass; and none may change before it."""
    ours = pair[0].train()
    others = {name: 1.5 * p.detach() for name, p in ours.named_parameters()}
    gradients = []
    for is_lean in (False, True):
        models.accelerate(ours, memory=MEMORY[is_lean])
        weights = {name: value.clone().requires_grad_() for name, value in others.items()}
        logits = torch.func.functional_call(ours, weights, formula_input(2, 64, 64))
        logits.logsumexp(1).sum().backward()
        gradients.append([value.grad for value in weights.values()])
    assert all(map(torch.equal, *gradients))
    loss = ours(formula_input(2, 64, 64)).sum()
    with torch.no_grad():
        ours.stages[0][0].norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lean_memory_has_second_derivatives(pair):
    """As a penalty on gradients wants them."""
    ours = pair[0].train()
    results = []
    for is_lean in (False, True):
        models.accelerate(ours, memory=MEMORY[is_lean])
        ours.zero_grad()
        x = formula_input(2, 32, 32).requires_grad_()
        (gradient,) = torch.autograd.grad(ours(x).logsumexp(1).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for plain, lean in zip(*results, strict=True):
        assert_near(lean, plain)


def test_lean_memory_of_a_part_that_is_not_trained(pair):
    ours = pair[0].train()
    models.accelerate(ours, memory="lean")
    for parameter in ours.stages[1].parameters():
        parameter.requires_grad_(False)
    gradients = []
    for is_lean in (True, False):
        models.accelerate(ours, memory=MEMORY[is_lean])
        ours.zero_grad()
        ours(formula_input(2, 64, 64)).logsumexp(1).sum().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
        )
    lean, plain = gradients
    assert lean.keys() == plain.keys()
    assert all(torch.equal(lean[name], plain[name]) for name in plain)


@needs_onednn
@pytest.mark.parametrize("channels", [(8, 24), (24, 8)])
@pytest.mark.parametrize("gelu", [False, True])
def test_pointwise_by_onednn(channels, gelu):
    narrow, wide = channels
    torch.manual_seed(0)
    x = torch.randn(2, narrow, 5, 7).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(wide, narrow, 1, 1), torch.randn(wide)
    results = []
    for by_onednn in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.backends.mkldnn.flags(enabled=by_onednn):
            assert onednn_serves(*inputs[:2]) == by_onednn
            y = pointwise(*inputs, gelu)
            with torch.no_grad():
                assert_near(pointwise(*inputs, gelu), y)
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append([y, *first, *second])
    expected = F.conv2d(x, weight, bias)
    assert_near(results[0][0], F.gelu(expected) if gelu else expected)
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@needs_onednn
def test_a_bias_alone_can_be_trained():
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    bias = torch.zeros(4, requires_grad=True)
    pointwise(x, torch.randn(4, 8), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 70.0))


@needs_onednn
def test_the_network_takes_onednn_in_float32(monkeypatch):
    """Else the comparisons above would compare a path with itself."""
    taken = []
    multiply = ops._matmul
    monkeypatch.setattr(ops, "_matmul", lambda *a: taken.append(a) or multiply(*a))
    model = timm.create_model("hornet_atto_7x7", base_dim=16, depths=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        models.accelerate(model)(torch.randn(1, 3, 64, 64))
    # proj_in, proj_out, order - 1 between them, and two of the MLP
    assert len(taken) == sum(block.gnconv.order + 3 for stage in model.stages for block in stage)
