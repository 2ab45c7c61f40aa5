"""HorFPN for both tasks, and layer decay over whole models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks.plugin import build_plugin_layer
from mmdet.registry import MODELS as MMDET
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmseg.registry import MODELS as MMSEG
from torch import nn

import dense.backbone
import dense.fpn
import dense.layer_decay
import dense.upernet  # noqa: F401 - all four register their parts
from dense.gnconv import GNConvModule
from dense.layer_decay import layer_ids
from runtime.errors import UserError
from tests.golden.formula import fill_by_formula, formula_input

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = json.loads((GOLDEN / "layer_ids.json").read_text())["ids"]
FILTERS = {"gnconv": None, "gngf": (32, 17)}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("kind", ["GNFPN", "HorFPN"])
def test_levels_of_a_pyramid(kind, name):
    neck = MMDET.build(
        {
            "type": kind,
            "in_channels": [16, 32, 64, 128],
            "out_channels": 64,
            "num_outs": 5,
            "global_filter": FILTERS[name],
        }
    )
    recorded = [str(key) for key in np.load(GOLDEN / f"decoder_{name}_k7_order2.npz")["keys"]]
    expected = {f"fpn_convs.{i}.{key}" for i in range(4) for key in recorded}
    expected |= {f"lateral_convs.{i}.conv.{k}" for i in range(4) for k in ("weight", "bias")}
    assert set(neck.state_dict()) == expected
    sides = (48, 24, 12, 6)
    maps = [torch.randn(1, 16 * 2**i, side, side + 4) for i, side in enumerate(sides)]
    levels = neck(tuple(maps))
    assert [tuple(level.shape) for level in levels] == [
        *((1, 64, side, side + 4) for side in sides),
        (1, 64, 3, 5),
    ]
    assert all(level.is_contiguous() for level in levels)
    torch.testing.assert_close(levels[4], nn.functional.max_pool2d(levels[3], 1, stride=2))


def test_extra_levels_are_no_convolutions():
    config = {"in_channels": [16, 32], "out_channels": 32, "num_outs": 3}
    with pytest.raises(ValueError, match="leave add_extra_convs out"):
        MMDET.build({"type": "HorFPN", "add_extra_convs": "on_output", **config})


@pytest.mark.parametrize("name", FILTERS)
def test_fusion_of_upernet(name):
    head = MMSEG.build(
        {
            "type": "GNUPerHead",
            "in_channels": [16, 32],
            "in_index": [0, 1],
            "channels": 64,
            "num_classes": 3,
            "norm_cfg": {"type": "BN"},
            "global_filter": FILTERS[name],
        }
    ).eval()
    golden = np.load(GOLDEN / f"decoder_{name}_k7_order2.npz")
    own = {n for n in head.state_dict() if n.startswith("fpn_bottleneck.") and ".bn." not in n}
    assert own == {f"fpn_bottleneck.{key}" for key in golden["keys"]}
    assert head([torch.randn(1, 16, 32, 32), torch.randn(1, 32, 16, 16)]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", FILTERS)
def test_recorded_layer(name):
    golden = np.load(GOLDEN / f"decoder_{name}_k7_order2.npz")
    layer = GNConvModule(96, 64, type=name, h=32, w=17, proj_out=True, act_cfg=None).eval()
    assert {k: str(list(v.shape)) for k, v in layer.state_dict().items()} == dict(
        zip(golden["keys"].tolist(), golden["shapes"].tolist(), strict=True)
    )
    with torch.no_grad():
        out = fill_by_formula(layer)(formula_input(2, 40, 56, 96)).numpy()
    scale = np.abs(golden["output_crop"]).max()
    np.testing.assert_allclose(out[:, :, :4, :4], golden["output_crop"], rtol=0, atol=1e-5 * scale)
    mean = golden["output_channel_mean"]
    np.testing.assert_allclose(out.mean((0, 2, 3)), mean, rtol=0, atol=1e-5 * np.abs(mean).max())


def release_shapes(prefix, in_channels, channels, order, dim_ratio, proj_out, mixer, norm=""):
    """Keys and shapes of the release's layer, with a 5x5 convolution or an 8 x 5 filter."""
    width = dim_ratio * channels
    widths = [width // 2**k for k in reversed(range(order))]
    total = sum(widths)
    pointwise = {"proj_in": (2 * width, in_channels)}
    pointwise |= {f"pws.{j}": (widths[j + 1], widths[j]) for j in range(order - 1)}
    if proj_out:
        pointwise["proj_out"] = (channels, width)
    shapes = {f"{key}.weight": (*pair, 1, 1) for key, pair in pointwise.items()}
    shapes |= {f"{key}.bias": pair[:1] for key, pair in pointwise.items()}
    if mixer == "gnconv":
        shapes |= {"dwconv.weight": (total, 1, 5, 5), "dwconv.bias": (total,)}
    else:
        shapes["dwconv.dw.weight"] = (total // 2, 1, 3, 3)
        shapes["dwconv.complex_weight"] = (total // 2, 8, 5, 2)
        shapes |= {
            f"dwconv.{side}_norm.{k}": (total,)
            for side in ("pre", "post")
            for k in ("weight", "bias")
        }
    if norm:
        names = ["weight", "bias"] + ["running_mean", "running_var"] * (norm == "bn")
        shapes |= {f"{norm}.{k}": (channels if proj_out else width,) for k in names}
        shapes |= {"bn.num_batches_tracked": ()} if norm == "bn" else {}
    return {f"{prefix}{key}": shape for key, shape in shapes.items()}


def shapes_of(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def by_equations(weights, x, order):
    """proj_in, mixer, gates, proj_out, batch norm and ReLU from a state dict, in numpy."""
    w = {key: value.numpy() for key, value in weights.items()}

    def pointwise(x, name):
        if f"{name}.weight" not in w:
            return x
        y = np.einsum("oc,bchw->bohw", w[f"{name}.weight"][:, :, 0, 0], x)
        return y + w[f"{name}.bias"][:, None, None]

    def depthwise(x, weight):
        k = weight.shape[-1]
        padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (2, 3))
        return np.einsum("bchwij,cij->bchw", windows, weight[:, 0])

    def layer_norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def mix(x):
        if "dwconv.weight" in w:
            return depthwise(x, w["dwconv.weight"]) + w["dwconv.bias"][:, None, None]
        local, spectral = np.split(layer_norm(x, "dwconv.pre_norm"), 2, axis=1)
        response = w["dwconv.complex_weight"] @ np.array([1, 1j])
        spectral = np.fft.irfft2(np.fft.rfft2(spectral) * response, s=x.shape[2:])
        mixed = np.stack((depthwise(local, w["dwconv.dw.weight"]), spectral), axis=2)
        return layer_norm(mixed.reshape(x.shape), "dwconv.post_norm")

    y = pointwise(x.numpy(), "proj_in")
    width = y.shape[1] // 2
    widths = [width // 2**k for k in reversed(range(order))]
    ends = np.cumsum([widths[0], *widths])
    p, q = y[:, : widths[0]], mix(y[:, widths[0] :])
    for k in range(order):
        p = p if k == 0 else pointwise(p, f"pws.{k - 1}")
        p = p * q[:, ends[k] - widths[0] : ends[k + 1] - widths[0]]
    y = pointwise(p, "proj_out")
    mean, var, scale, shift = (
        w[f"bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return np.maximum((y - mean) / np.sqrt(var + 1e-5) * scale + shift, 0)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("dim_ratio", "proj_out"), [(1, True), (2, True), (1, False), (2, False)])
@pytest.mark.parametrize("mixer", FILTERS)
def test_layer_of_the_release(mixer, dim_ratio, proj_out, order):
    """The map is as large as the filter: 8 x 8 for 8 x 5."""
    config = {"type": mixer, "dim_ratio": dim_ratio, "proj_out": proj_out, "order": order}
    layer = GNConvModule(12, 8, kernel_size=5, h=8, norm_cfg={"type": "BN"}, **config).double()
    shapes = release_shapes("", 12, 8, order, dim_ratio, proj_out, mixer, "bn")
    assert shapes_of(layer) == shapes
    fill_by_formula(layer.eval())
    layer.bn.running_var.abs_().add_(0.1)
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    expected = by_equations(layer.state_dict(), x, order)
    assert (expected > 0).any()
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_layer_by_its_name():
    """Of a config in which `type` is the name of the class."""
    config = {"type": "GNConvModule", "in_channels": 6, "out_channels": 8, "order": 3}
    for registry in (MMDET, MMSEG, MODELS):
        layer = registry.build({**config, "global_filter": [8, 5], "dim_ratio": 2})
        assert type(layer) is GNConvModule
        assert shapes_of(layer) == release_shapes("", 6, 8, 3, 2, False, "gngf")
        assert isinstance(layer.activate, nn.ReLU)
    _, layer = build_plugin_layer({**config, "kernel_size": 5, "norm_cfg": {"type": "GN",
                                   "num_groups": 2}, "act_cfg": {"type": "GELU"}})  # fmt: skip
    assert {k for k in layer.state_dict() if k.startswith("gn.")} == {"gn.weight", "gn.bias"}
    assert isinstance(layer.activate, nn.GELU)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dims'"):
        MMDET.build({**config, "dims": 2})


def test_options_of_the_layer():
    layer = GNConvModule(6, 8, type="gngf", h=8, gf_kernel_size=5, inplace=True)
    assert layer.dwconv.dw.weight.shape[2:] == (5, 5)
    assert layer.activate.inplace
    assert layer(torch.randn(1, 6, 9, 4)).shape == (1, 8, 9, 4)
    assert isinstance(GNConvModule(6, 8, act_cfg={"type": "GELU"}, inplace=True).activate, nn.GELU)
    assert GNConvModule(6, 8).dwconv.kernel_size == (7, 7)


PYRAMID = {"in_channels": [6, 12], "out_channels": 8, "num_outs": 3}
HEAD = {
    "in_channels": [6, 12],
    "in_index": [0, 1],
    "channels": 8,
    "num_classes": 3,
    "norm_cfg": {"type": "BN"},
}


@pytest.mark.parametrize("mixer", FILTERS)
@pytest.mark.parametrize(("dim_ratio", "order"), [(1, 2), (2, 3)])
def test_decoders_from_configs_of_the_release(mixer, dim_ratio, order):
    config = {"type": mixer, "kernel_size": 5, "h": 8, "w": 5}
    config |= {"dim_ratio": dim_ratio, "order": order, "proj_out": True}
    neck = MMDET.build({"type": "GNFPN", "gn_conv_cfg": config, **PYRAMID})
    expected = {}
    for i in range(2):
        expected |= release_shapes(f"fpn_convs.{i}.", 8, 8, order, dim_ratio, True, mixer)
    assert {k: v for k, v in shapes_of(neck).items() if k.startswith("fpn_convs.")} == expected
    levels = neck((torch.randn(2, 6, 16, 12), torch.randn(2, 12, 8, 6)))
    assert [tuple(x.shape[1:]) for x in levels] == [(8, 16, 12), (8, 8, 6), (8, 4, 3)]
    for name in ("conv_cfg", "gn_conv_cfg"):
        head = MMSEG.build({"type": "GNUPerHead", name: config, **HEAD})
        fusion = head.fpn_bottleneck
        expected = release_shapes("", 16, 8, order, dim_ratio, True, mixer, "bn")
        assert shapes_of(fusion) == expected
        assert isinstance(fusion.activate, nn.ReLU)
        y = head([torch.randn(2, 6, 16, 12), torch.randn(2, 12, 8, 6)])
        assert y.shape == (2, 3, 16, 12)


def test_defaults_of_the_release():
    """The two decoders of the release differ in their default kernel and filter."""
    norm = {"norm_cfg": {"type": "BN"}, "act_cfg": {"type": "ReLU"}}
    for config, size in (({}, (7, 7)), ({"type": "gngf", "h": 14}, (14, 17))):
        layer = MMDET.build({"type": "HorFPN", "gn_conv_cfg": config, **norm, **PYRAMID})
        convs = layer.fpn_convs
        assert all(size_of_mixer(conv) == size for conv in convs)
        assert all("bn.weight" in conv.state_dict() for conv in convs)
        assert all(isinstance(conv.proj_out, nn.Identity) for conv in convs)
    for config, size in (({}, (3, 3)), ({"type": "gngf", "h": 14}, (14, 8))):
        head = MMSEG.build({"type": "GNUPerHead", "conv_cfg": config, **HEAD})
        assert size_of_mixer(head.fpn_bottleneck) == size
        assert isinstance(head.fpn_bottleneck.proj_out, nn.Identity)


def size_of_mixer(layer):
    if isinstance(layer.dwconv, nn.Conv2d):
        return layer.dwconv.kernel_size
    return tuple(layer.dwconv.complex_weight.shape[1:3])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "gcn"}, "no type 'gcn': choose gnconv or gngf"),
        ({"ratio": 2}, "unexpected keyword argument 'ratio'"),
        ({"norm_cfg": None}, "multiple values for keyword argument 'norm_cfg'"),
        ({"dim_ratio": 2}, "16 channels for 8: give proj_out=True"),
        ({"dim_ratio": 0}, "whole number from 1 on, not 0"),
        ({"dim_ratio": 1.5}, "dim_ratio of a GNConvModule is a whole number, not 1.5"),
        ({"order": "3"}, "order of a GNConvModule is a whole number, not '3'"),
        ({"order": 5}, "multiple of 16 channels, not 8"),
        ({"kernel_size": 4}, "odd, not 4"),
        ({"proj_out": "no"}, "proj_out of a GNConvModule is True or False, not 'no'"),
        ({"type": "gngf", "h": 0}, "positive height and width"),
        ({"type": "gngf", "gf_kernel_size": 2}, "odd, not 2"),
        ("gngf", "mapping"),
    ],
)
def test_wrong_configs_are_one_line(config, message):
    for registry, owner, decoder in (
        (MMDET, "gn_conv_cfg of HorFPN", {"type": "HorFPN", "gn_conv_cfg": config, **PYRAMID}),
        (MMSEG, "conv_cfg of GNUPerHead", {"type": "GNUPerHead", "conv_cfg": config, **HEAD}),
    ):
        with pytest.raises(UserError, match=message) as error:
            registry.build(decoder)
        assert owner in str(error.value)
        assert "\n" not in str(error.value)


def test_configs_of_the_release_stand_alone():
    for own in ({"order": 3}, {"kernel_size": 3}, {"global_filter": (8, 5)}):
        for registry, decoder in (
            (MMDET, {"type": "HorFPN", "gn_conv_cfg": {}, **PYRAMID}),
            (MMSEG, {"type": "GNUPerHead", "conv_cfg": {}, **HEAD}),
        ):
            with pytest.raises(UserError, match="order, kernel_size and global_filter belong"):
                registry.build({**decoder, **own})
    with pytest.raises(UserError, match="give one of them"):
        MMSEG.build({"type": "GNUPerHead", "conv_cfg": {}, "gn_conv_cfg": {}, **HEAD})


class Detector(nn.Module):
    """A backbone and something behind it."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = MODELS.build({"type": "HorNet", "arch": "tiny_gf", **kwargs})
        self.neck = nn.Linear(2, 2)


def test_recorded_layer_ids():
    with torch.device("meta"):
        model = Detector()
    ids = layer_ids(model, 12, "layer_wise")
    for name, index in ids.items():
        own = name.removeprefix("backbone.")
        if own == name or own.startswith("norm"):
            assert index == 13
        else:
            parts = own.split(".")
            key = ".".join(parts[: 3 if parts[0] == "stages" else 2])
            assert index == IDS[key], name
    stages = layer_ids(model, 12, "stage_wise")
    assert stages["backbone.downsample_layers.3.1.weight"] == 0
    assert stages["backbone.stages.2.17.gamma1"] == 3
    assert stages["backbone.norm0.weight"] == stages["neck.bias"] == 13


@pytest.mark.parametrize(("num_layers", "decay_rate"), [(12, 0.7), (6, 0.95)])
def test_rates_of_the_groups(num_layers, decay_rate):
    model = Detector(frozen_stages=0).train()
    wrapper = build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "constructor": "LearningRateDecayOptimizerConstructorHorNet",
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05},
            "paramwise_cfg": {"num_layers": num_layers, "decay_rate": decay_rate},
        },
    )
    ids = layer_ids(model, num_layers, "layer_wise")
    named = dict(model.named_parameters())
    seen = []
    for group in wrapper.optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is named[name]
            expected = 1e-3 * decay_rate ** (num_layers + 1 - ids[name])
            assert group["lr"] == pytest.approx(expected)
            decays = parameter.ndim > 1 and not name.endswith("bias")
            assert group["weight_decay"] == (0.05 if decays else 0)
            seen.append(name)
    assert sorted(seen) == sorted(name for name, p in named.items() if p.requires_grad)
    # the released configs of HorFPN have 6 layers and ids up to 12: rates above the base rate
    highest = max(group["lr"] for group in wrapper.optimizer.param_groups)
    assert highest == pytest.approx(1e-3 if num_layers == 12 else 1e-3 * 0.95**-5)


def test_layer_decay_needs_a_hornet():
    with pytest.raises(UserError, match="whose backbone is a HorNet"):
        layer_ids(nn.Linear(2, 2), 12, "layer_wise")
    with pytest.raises(UserError, match="give layer_wise or stage_wise"):
        layer_ids(nn.Linear(2, 2), 12, "blockwise")
