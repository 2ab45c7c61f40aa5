"""The backbone of detectors and segmentors: names, recorded outputs, layout, start weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from mmcv.ops import RoIAlign
from mmengine.registry import MODELS
from torch import nn

import dense.backbone  # noqa: F401 - registers HorNet
from runtime.errors import UserError
from tests.golden.formula import fill_by_formula, formula_input

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"arch": "atto_gf", "base_dim": 16, "depths": (1, 1, 2, 1)}


def build(**kwargs):
    torch.manual_seed(0)
    return MODELS.build({"type": "HorNet", **kwargs})


@pytest.mark.parametrize("arch", ["tiny_7x7", "tiny_gf"])
def test_names_are_those_of_the_released_detectors(arch):
    layouts = json.loads((GOLDEN / "state_dict_layouts.json").read_text())
    recorded = {
        name: tuple(shape)
        for name, shape in layouts[f"hornet_{arch}"].items()
        if not name.startswith(("norm.", "head."))
    }
    widths = {f"norm{i}.{kind}": (64 * 2**i,) for i in range(4) for kind in ("weight", "bias")}
    backbone = build(arch=arch)
    assert {n: tuple(v.shape) for n, v in backbone.state_dict().items()} == recorded | widths


@pytest.mark.parametrize(
    ("arch", "height", "width"), [("tiny_7x7", 224, 224), ("tiny_gf", 192, 256)]
)
def test_recorded_outputs(arch, height, width):
    golden = np.load(GOLDEN / f"hornet_{arch}_{height}x{width}.npz")
    backbone = fill_by_formula(build(arch=arch)).eval()
    for index in range(4):  # the recorded maps are those before the norms
        setattr(backbone, f"norm{index}", nn.Identity())
    with torch.no_grad():
        maps = backbone(formula_input(2, height, width))
    for index, level in enumerate(maps):
        assert tuple(level.shape) == tuple(golden[f"stage{index}_shape"])
        mean = level.mean(dim=(0, 2, 3)).numpy()
        recorded = golden[f"stage{index}_channel_mean"]
        np.testing.assert_allclose(mean, recorded, rtol=0, atol=1e-5 * np.abs(recorded).max())


def test_maps_are_normed_over_their_channels():
    backbone = build(**SMALL).eval()
    for level in backbone(torch.randn(2, 3, 64, 96)):
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), atol=1e-5, rtol=0)
    assert [tuple(m.shape[1:]) for m in backbone(torch.randn(1, 3, 64, 96))] == [
        (16, 16, 24),
        (32, 8, 12),
        (64, 4, 6),
        (128, 2, 3),
    ]


def test_roi_align_reads_the_maps_rightly():
    """mmcv's operator takes any strides for contiguous ones; torchvision's does not."""
    level = build(**SMALL).eval()(torch.randn(2, 3, 128, 128))[0].detach()
    assert level.is_contiguous()
    boxes = torch.tensor([[0, 3.0, 5.0, 60.0, 90.0], [1, 10.0, 0.0, 100.0, 70.0]])
    ours = RoIAlign((7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=True)(level, boxes)
    theirs = torchvision.ops.roi_align(level, boxes, (7, 7), 0.25, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(ours, theirs)


def test_frozen_from_the_start():
    """DistributedDataParallel and the optimizer ask before a training begins."""
    backbone = build(**SMALL, frozen_stages=0)
    assert not any(p.requires_grad for p in backbone.stages[0].parameters())
    assert all(p.requires_grad for p in backbone.stages[1].parameters())


def test_arguments_reach_the_network():
    backbone = build(**SMALL, drop_path_rate=0.4)
    drops = [block.drop_path for stage in backbone.stages for block in stage]
    assert [getattr(drop, "drop_prob", 0.0) for drop in drops] == pytest.approx(
        [0.4 * i / 4 for i in range(5)]
    )
    assert all(
        (block.gamma1 == 1).all() and (block.gamma2 == 1).all()
        for stage in backbone.stages
        for block in stage
    )


def test_chosen_maps_have_the_only_norms():
    backbone = build(**SMALL, out_indices=(1, 3))
    assert [level.shape[1] for level in backbone(torch.randn(1, 3, 64, 64))] == [32, 128]
    assert {n.split(".")[0] for n in backbone.state_dict() if n.startswith("norm")} == {
        *("norm1", "norm3"),
    }


def test_frozen_stages_stay_as_they_start():
    backbone = build(**SMALL, frozen_stages=1, drop_path_rate=0.5)
    sum(level.square().sum() for level in backbone(torch.randn(2, 3, 64, 64))).backward()
    moved = {name for name, p in backbone.named_parameters() if p.grad is not None}
    frozen = ("downsample_layers.0", "downsample_layers.1", "stages.0", "stages.1")
    assert not any(name.startswith(frozen) for name in moved)
    assert {n for n, _ in backbone.named_parameters() if not n.startswith(frozen)} == moved
    assert not backbone.stages[1].training
    assert backbone.stages[2].training


def test_recomputed_gradients_are_the_same():
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for with_cp in (False, True):
        backbone = build(**SMALL, with_cp=with_cp).train()
        calls = []
        backbone.stages[2][1].gnconv.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        backbone(image)[-1].square().sum().backward()
        gradients.append(backbone.downsample_layers[0][0].weight.grad)
        assert len(calls) == (2 if with_cp else 1)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("given", ["pretrained", "init_cfg"])
def test_start_weights_of_a_classifier(tmp_path, given):
    small = {name: value for name, value in SMALL.items() if name != "arch"}
    torch.manual_seed(1)
    saved = timm.create_model("hornet_atto_gf", layer_scale_init_value=1.0, **small).state_dict()
    torch.save({"model": saved}, tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    pretrained = {"type": "Pretrained", "checkpoint": path}
    filters = (None, None, (24, 13), (12, 7))
    options = {"pretrained": path} if given == "pretrained" else {"init_cfg": pretrained}
    backbone = build(**SMALL, global_filters=filters, **options)
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        if "complex_weight" in name:  # resized, with the corners kept
            torch.testing.assert_close(value[:, 0, 0], saved[name][:, 0, 0])
        elif not name.startswith("norm"):
            torch.testing.assert_close(value, saved[name])


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"init_cfg .*: give dict\(type='Pretrained'"):
        build(**SMALL, init_cfg={"checkpoint": "x.pth"})
    with pytest.raises(UserError, match="there is no arch 'tinny'; choose one of .*tiny_7x7"):
        build(arch="tinny")
    torch.save({"model": timm.create_model("hornet_atto_7x7").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is of another model"):
        build(**SMALL, pretrained=str(tmp_path / "w.pth")).init_weights()
    with pytest.raises(UserError, match="does not exist"):
        build(**SMALL, pretrained=str(tmp_path / "none.pth")).init_weights()
