"""What timm and its users expect of a model family."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from models import (
    Block,
    GlobalLocalFilter,
    GnConv,
    HorNet,
    checkpoint_filter_fn,
    set_global_filter_impl,
)

LAYER_IDS = json.loads(
    (Path(__file__).parents[1] / "golden" / "layer_ids.json").read_text()
)["ids"]  # fmt: skip
SMALL = {"base_dim": 16, "depths": (1, 1, 2, 1), "num_classes": 10}


def small(name: str = "hornet_atto_gf", **kwargs) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **kwargs})


def images(batch: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, side, side)


def layer_ids(model: nn.Module) -> dict[str, int]:
    return group_parameters(model, model.group_matcher(), reverse=True)


@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "hornet_tiny_gf"])
@pytest.mark.parametrize("num_classes", [1000, 0])
def test_layer_decay(name, num_classes):
    model = timm.create_model(name, device="meta", num_classes=num_classes)
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for p in group["params"]:
            scales[p] = group["lr_scale"]
    ids = layer_ids(model)
    for key, p in model.named_parameters():
        expected = next(v for k, v in LAYER_IDS.items() if key.startswith(f"{k}."))
        assert ids[key] == expected
        assert scales[p] == 0.5 ** (13 - expected)


@pytest.mark.parametrize(
    ("depths", "last"), [((2, 2, 6, 2), 7), ((1, 1, 1, 1), 5), ((3, 3, 27, 3), 18)]
)
@pytest.mark.parametrize("num_classes", [5, 0])
def test_layer_ids_of_other_depths(depths, last, num_classes):
    model = timm.create_model(
        "hornet_atto_7x7", device="meta", depths=depths, num_classes=num_classes
    )
    ids = layer_ids(model)
    pairs = (depths[2] + 1) // 2
    assert last == pairs + 4
    for key, layer in ids.items():
        parts = key.split(".")
        expected = last
        if parts[0] in ("downsample_layers", "stages"):
            stage = int(parts[1])
            expected = {0: 1, 1: 2, 2: 3, 3: last - 1}[stage]
            if parts[0] == "stages" and stage == 2:
                expected += int(parts[2]) // 2
            if key.startswith("downsample_layers.0."):
                expected = 0
        assert layer == expected, key


def test_coarse_groups():
    model = small()
    ids = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(ids.values()) == set(range(6))
    assert {layer for key, layer in ids.items() if key.startswith("stages.2.")} == {3}


@pytest.mark.parametrize("name", ["hornet_atto_7x7", "hornet_atto_gf"])
@pytest.mark.parametrize("impl", ["fft", "matmul"])
def test_gradients_reach_every_parameter(name, impl):
    model = small(name, global_filter_impl=impl).train()
    model(images()).square().mean().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
        assert p.grad.abs().sum() > 0, key


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("hornet_atto_gf", head_init_scale=0.5)
    for key, p in model.named_parameters():
        last = key.rsplit(".", 1)[-1]
        if last.startswith("gamma"):
            assert (p == 1e-6).all(), key
        elif last == "bias":
            assert (p == 0).all(), key
        elif "norm" in key or key == "downsample_layers.0.1.weight" or p.ndim == 1:
            assert (p == 1).all(), key
        else:
            std = 0.01 if key == "head.weight" else 0.02
            assert abs(p.std() / std - 1) < 5 / p.numel() ** 0.5, key
            assert p.abs().max() < 7 * std


def test_initialisation_after_to_empty():
    model = small(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_options_of_the_blocks():
    model = HorNet(
        depths=(1, 2, 1, 1),
        base_dim=16,
        orders=(1, 2, 2, 3),
        kernel_size=5,
        s=0.5,
        drop_path_rate=0.4,
        layer_scale_init_value=0.0,
        mlp_ratio=2,
        num_classes=3,
    )
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    assert all(b.gamma1 is None and b.gnconv.dwconv.kernel_size == (5, 5) for b in blocks)
    assert [b.gnconv.order for b in blocks] == [1, 2, 2, 2, 3]
    assert blocks[0].pwconv1.out_features == 32
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]
    assert rates == torch.linspace(0, 0.4, 5).tolist()  # as in the release
    assert model(images()).shape == (2, 3)


def test_stochastic_depth_and_dropout_act_in_training_only():
    torch.manual_seed(0)
    model = small(drop_path_rate=0.5, drop_rate=0.5, layer_scale_init_value=1.0)
    x = images()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_dim": 12}, "multiple of 8 channels, not 12|multiple of"),
        ({"depths": (1, 1)}, "one entry per stage"),
        ({"global_pool": "median"}, "unknown global_pool 'median'"),
        ({"global_filter_impl": "dct"}, "unknown global filter implementation"),
        ({"kernel_size": 6}, "odd, not 6"),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**{"orders": (5, 5, 5, 5), **arguments} if "base_dim" in arguments else arguments)
    assert "\n" not in str(error.value)


def test_unknown_arguments_are_refused():
    for name in ("not_an_argument", "scale", "mixer"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            small(**{name: 1})


def test_smallest_image():
    model = small().eval()
    assert model(images(side=32)).shape == (2, 10)
    assert model(torch.randn(1, 3, 33, 71)).shape == (1, 10)
    with pytest.raises(ValueError, match="28 x 28 are too small: this model takes 32 x 32"):
        model(images(side=28))
    shallow = small(features_only=True, out_indices=(0, 1, 2)).eval()
    assert [f.shape[-1] for f in shallow(images(side=28))] == [7, 3, 1]


def test_forward_parts():
    model = small(drop_rate=0.5).eval()
    x = images()
    features = model.forward_features(x)
    assert features.shape == (2, 128, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, model.num_features)
    expected = torch.nn.functional.layer_norm(
        features.mean((2, 3)), (128,), model.norm.weight, model.norm.bias, 1e-6
    )
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


def test_reset_classifier():
    model = small(global_pool="max", head_init_scale=1e-3).eval()
    x = images()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model.get_classifier().weight.abs().max() < 1e-3
    assert not model.head.training
    torch.testing.assert_close(model.forward_head(model.forward_features(x), True), pooled)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 128, 2, 2)
    model.reset_classifier(3)  # a head without pooling: a map of logits
    assert model(x).shape == (2, 3, 2, 2)
    assert {key for key in model.state_dict() if not key.startswith(("stages", "down"))} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias"
    }  # fmt: skip


def test_without_classes_and_with_other_channels():
    assert small(num_classes=0)(images()).shape == (2, 128)
    assert small(num_classes=0, global_pool="")(images()).shape == (2, 128, 2, 2)
    model = small(in_chans=5)
    assert model(images(channels=5)).shape == (2, 10)
    assert model.in_chans == 5


def test_device_and_dtype():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = small(dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(images().to(dtype)).dtype == dtype
    assert {p.device.type for p in small(device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("feature_cls", [None, "fx", "hook", "getter"])
def test_features_only(feature_cls):
    torch.manual_seed(0)
    full = small().eval()
    x = images()
    torch.manual_seed(0)
    model = small(features_only=True, feature_cls=feature_cls).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [16, 32, 64, 128]
    for actual, expected in zip(
        model(x), full.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_features_only_trains_without_unused_parameters():
    for indices in ((0, 1, 2, 3), (1,), (0, 2)):
        model = small(features_only=True, out_indices=indices).train()
        model.set_grad_checkpointing()
        features = model(images())
        assert len(features) == len(indices)
        sum(f.sum() for f in features).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_forward_intermediates():
    model = small().eval()
    x = images()
    final, stages = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert torch.equal(final, stages[-1])
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in stages)
    only = model.forward_intermediates(x, indices=[1, -1], intermediates_only=True)
    assert torch.equal(only[0], stages[1])
    assert torch.equal(only[1], stages[3])
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert len(last_two) == 2
    early, taken = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(early, taken[0])
    assert torch.equal(early, stages[1])
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[2], stages[2])
    torch.testing.assert_close(normed[3], model.norm(stages[3]))


def test_prune_intermediate_layers():
    model = small().eval()
    x = images()
    logits = model(x)
    stages = model.forward_intermediates(x, intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1]
    assert len(pruned.stages) == len(pruned.downsample_layers) == 2
    assert pruned.num_features == pruned.head_hidden_size == 32
    torch.testing.assert_close(pruned(x), stages[1])
    pruned.reset_classifier(3, "avg")
    assert pruned(x).shape == (2, 3)
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers(2, prune_head=False) == [2, 3]
    torch.testing.assert_close(kept(x), logits)


def test_gradient_checkpointing():
    torch.manual_seed(0)
    model = small(layer_scale_init_value=1.0).train()
    x = images()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(stage.grad_checkpointing for stage in model.stages)
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_models(dtype):
    """224 pixels: the global filters work on 14 x 14 and 7 x 7 maps."""
    torch.manual_seed(0)
    model = small(layer_scale_init_value=1.0).eval()
    x = images(batch=1, side=224)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            outputs = [model(x)]
        outputs.append(copy.deepcopy(model).to(dtype)(x.to(dtype)))
    for y in outputs:
        assert y.dtype == dtype
        assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_any_memory_format_gives_the_same():
    model = small(layer_scale_init_value=1.0).eval()
    x = images()
    y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.to(memory_format=torch.channels_last)(x), y, rtol=1e-4, atol=1e-5
    )


def test_checkpoints_of_other_wrappings_and_filter_sizes():
    source = small(global_filters=(None, None, (8, 5), (4, 3)))
    model = small()
    wrapped = {
        "model": {f"module._orig_mod.{k}": v for k, v in source.state_dict().items()},
        "epoch": 3,
    }
    state_dict = checkpoint_filter_fn(wrapped, model)
    model.load_state_dict(state_dict)
    filters = [m.complex_weight for m in model.modules() if isinstance(m, GlobalLocalFilter)]
    assert [tuple(f.shape[1:3]) for f in filters] == [(14, 8), (14, 8), (7, 4)]
    # the same corners, and untouched where nothing is to resize
    origin = source.state_dict()
    key = "stages.2.0.gnconv.dwconv.complex_weight"
    torch.testing.assert_close(state_dict[key][:, 0, 0], origin[key][:, 0, 0])
    torch.testing.assert_close(state_dict[key][:, -1, -1], origin[key][:, -1, -1])
    same = checkpoint_filter_fn(origin, source)
    assert all(torch.equal(same[k], v) for k, v in origin.items())


def test_loading_from_a_file(tmp_path):
    source = small(num_classes=3)
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    overlay = {"file": str(path), "num_classes": 3}
    x = images()
    model = small(num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.eval()(x), source.eval()(x))
    # another number of classes and of channels: timm makes the head anew and adapts the stem
    other = small(num_classes=5, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    assert other(images(channels=1)).shape == (2, 5)


def test_set_global_filter_impl():
    model = small(layer_scale_init_value=1.0).eval()
    x = images()
    expected = model(x)
    set_global_filter_impl(model, "matmul")
    filters = [m for m in model.modules() if isinstance(m, GlobalLocalFilter)]
    assert len(filters) == 3
    assert all(m.impl == "matmul" for m in filters)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown global filter implementation 'dct'"):
        set_global_filter_impl(torch.nn.Linear(1, 1), "dct")


def test_one_definition_of_the_layer():
    layers = [m for m in small().modules() if isinstance(m, GnConv)]
    assert len(layers) == 5
    assert {layer.scale for layer in layers} == {1 / 3}
