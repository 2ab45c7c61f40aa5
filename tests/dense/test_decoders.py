"""HorFPN for both tasks, and layer decay over whole models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS as MMDET
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmseg.registry import MODELS as MMSEG
from torch import nn

import dense.backbone
import dense.fpn
import dense.layer_decay
import dense.upernet  # noqa: F401 - all four register their parts
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
    """Filled by the formula, the gnConv of the head gives the recorded outputs."""
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
    # 96 channels go in where the layer was recorded
    config = {"global_filter": FILTERS[name], "order": 2}
    fusion = dense.upernet.GnConvModule(96, 64, {"type": "BN"}, {"type": "ReLU"}, **config).eval()
    fusion.bn, fusion.activate = nn.Identity(), nn.Identity()
    with torch.no_grad():
        out = fill_by_formula(fusion)(formula_input(2, 40, 56, 96)).numpy()
    scale = np.abs(golden["output_crop"]).max()
    np.testing.assert_allclose(out[:, :, :4, :4], golden["output_crop"], rtol=0, atol=1e-5 * scale)


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
