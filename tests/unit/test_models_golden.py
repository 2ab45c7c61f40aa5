"""The models compute what the released ones compute: recorded outputs, layouts, sizes."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import models
from tests.golden.formula import fill_by_formula, formula_input

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = json.loads((GOLDEN / "state_dict_layouts.json").read_text())
ZOO = json.loads((GOLDEN / "model_zoo.json").read_text())["models"]
NAMES = timm.list_models("hornet_*")


def largest_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(np.abs(actual.numpy() - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def tiny():
    """Both tiny models, filled by formula once."""
    names = ("hornet_tiny_7x7", "hornet_tiny_gf")
    return {name: fill_by_formula(timm.create_model(name)).eval() for name in names}


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize(
    ("name", "height", "width", "impl"),
    [
        ("hornet_tiny_7x7", 224, 224, "fft"),
        ("hornet_tiny_gf", 224, 224, "fft"),
        ("hornet_tiny_gf", 224, 224, "matmul"),
        ("hornet_tiny_gf", 192, 256, "fft"),
        ("hornet_tiny_gf", 192, 256, "matmul"),
    ],
)
def test_recorded_outputs(tiny, name, height, width, impl, fast):
    golden = np.load(GOLDEN / f"{name}_{height}x{width}.npz")
    model = copy.deepcopy(tiny[name])
    models.set_global_filter_impl(model, impl)
    if fast:
        models.accelerate(model)
    with torch.no_grad():
        features, stages = model.forward_intermediates(formula_input(2, height, width))
        logits = model.forward_head(features)
    assert largest_error(logits, golden["logits"]) < 1e-5
    assert len(stages) == 4
    for i, stage in enumerate(stages):
        assert list(stage.shape) == golden[f"stage{i}_shape"].tolist()
        assert largest_error(stage.mean((0, 2, 3)), golden[f"stage{i}_channel_mean"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "global_filter", "impl"),
    [("gnconv", None, "fft"), ("gngf", (32, 17), "fft"), ("gngf", (32, 17), "matmul")],
)
def test_recorded_decoder_layer(name, global_filter, impl):
    golden = np.load(GOLDEN / f"decoder_{name}_k7_order2.npz")
    layer = models.GnConv(96, 64, order=2, global_filter=global_filter, global_filter_impl=impl)
    fill_by_formula(layer)
    layout = {key: str(list(value.shape)) for key, value in layer.state_dict().items()}
    assert layout == dict(zip(golden["keys"].tolist(), golden["shapes"].tolist(), strict=True))
    with torch.no_grad():
        y = layer(formula_input(2, 40, 56, channels=96))
    assert largest_error(y.mean((0, 2, 3)), golden["output_channel_mean"]) < 1e-5
    assert largest_error(y[:, :, :4, :4], golden["output_crop"]) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_layout(name):
    state_dict = timm.create_model(name, device="meta").state_dict()
    layout = {key: list(value.shape) for key, value in state_dict.items()}
    assert layout == LAYOUTS[name]
    assert list(layout) == list(LAYOUTS[name])


@pytest.mark.parametrize("name", ZOO)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == ZOO[name]["params"]


def test_family():
    own = [f"hornet_{size}_{mixer}" for size in ("atto", "femto", "pico", "nano")
           for mixer in ("7x7", "gf")]  # fmt: skip
    assert set(NAMES) == set(ZOO) | set(own)
    assert set(NAMES) <= set(models.__all__)
    for name in NAMES:
        assert callable(getattr(models, name))
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url == ZOO.get(name, {}).get("checkpoint_url")
        assert ("without released weights" in (cfg.description or "")) == (name in own)
        squash = (1.0, "squash") if name.endswith("img384") else (0.875, "center")
        assert (cfg.crop_pct, cfg.crop_mode) == squash


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_on_the_meta_device(name):
    model = timm.create_model(name, device="meta", num_classes=7)
    side = model.pretrained_cfg["input_size"][-1]
    x = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad():
        features, stages = model.forward_intermediates(x)
        assert model.forward_head(features).shape == (1, 7)
    base = model.feature_info[0]["num_chs"]
    expected = [(1, base * 2**i, side // 2 ** (i + 2), side // 2 ** (i + 2)) for i in range(4)]
    assert [tuple(stage.shape) for stage in stages] == expected
    for i, (h, w) in enumerate(((side // 16, side // 32 + 1), (side // 32, side // 64 + 1)), 2):
        if "gf" in name:
            filters = model.stages[i][0].gnconv.dwconv.complex_weight
            assert filters.shape[1:3] == (h, w)


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano"])
def test_small_variants_are_of_the_size_of_timms_convnexts(size):
    def count(name):
        model = timm.create_model(name, device="meta")
        return sum(p.numel() for p in model.parameters())

    for mixer in ("7x7", "gf"):
        ratio = count(f"hornet_{size}_{mixer}") / count(f"convnext_{size}")
        assert 0.9 < ratio < 1.11
