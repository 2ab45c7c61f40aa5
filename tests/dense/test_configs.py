"""The released configs: every one builds, with the published parameters and hyperparameters."""

import importlib.util
import json
import logging
import re
from pathlib import Path

import pytest
import timm
import torch
from mmdet.registry import MODELS as MMDET
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmseg.registry import MODELS as MMSEG
from torch import nn

from models import GnConv

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("*/configs/hor*/*.py"))
ZOO = json.loads((ROOT / "tests/golden/dense_zoo.json").read_text())
# published: millions of parameters, rate, layer decay, its layers, drop path, gradient clipping
PUBLISHED = {
    "cascade_mask_rcnn_hornet_tiny_7x7_3x_coco_in1k": (80, 2e-4, 0.7, 12, 0.4, None),
    "cascade_mask_rcnn_hornet_tiny_gf_3x_coco_in1k": (80, 2e-4, 0.7, 12, 0.4, None),
    "cascade_mask_rcnn_hornet_small_7x7_3x_coco_in1k": (107, 2e-4, 0.7, 12, 0.6, None),
    "cascade_mask_rcnn_hornet_small_gf_3x_coco_in1k": (108, 2e-4, 0.7, 12, 0.6, None),
    "cascade_mask_rcnn_hornet_base_7x7_3x_coco_in1k": (144, 2e-4, 0.8, 12, 0.7, None),
    "cascade_mask_rcnn_hornet_base_gf_3x_coco_in1k": (146, 2e-4, 0.8, 12, 0.7, None),
    "cascade_mask_rcnn_hornet_large_7x7_3x_coco_in22k": (251, 1e-4, 0.7, 12, 0.7, None),
    "cascade_mask_rcnn_hornet_large_gf_3x_coco_in22k": (259, 1e-4, 0.7, 12, 0.7, None),
    "fpn_mask_rcnn_hornet_small_7x7_1x_coco_in1k": (None, 1e-4, 0.95, 6, 0.6, None),
    "horfpn_7x7_mask_rcnn_hornet_small_7x7_1x_coco_in1k": (None, 1e-4, 0.95, 6, 0.6, None),
    "horfpn_gf_mask_rcnn_hornet_small_7x7_1x_coco_in1k": (None, 1e-4, 0.95, 6, 0.6, None),
    "upernet_hornet_tiny_7x7_512_160k_ade20k": (52, 1e-4, 0.9, 6, 0.4, None),
    "upernet_hornet_tiny_gf_512_160k_ade20k": (55, 1e-4, 0.9, 6, 0.4, 1),
    "upernet_hornet_small_7x7_512_160k_ade20k": (81, 1e-4, 0.9, 12, 0.3, None),
    "upernet_hornet_small_gf_512_160k_ade20k": (85, 1e-4, 0.9, 12, 0.3, 1),
    "upernet_hornet_base_7x7_512_160k_ade20k": (121, 1e-4, 0.9, 12, 0.4, None),
    "upernet_hornet_base_gf_512_160k_ade20k": (126, 1e-4, 0.9, 12, 0.5, 1),
    "upernet_hornet_large_7x7_640_160k_ade20k": (232, 1e-4, 0.8, 12, 0.4, None),
    "upernet_hornet_large_gf_640_160k_ade20k": (239, 1e-4, 0.8, 12, 0.4, 0.1),
    "horfpn_7x7_upernet_hornet_small_7x7_512_160k_ade20k": (None, 1e-4, 0.9, 12, 0.3, None),
    "horfpn_gf_upernet_hornet_small_7x7_512_160k_ade20k": (None, 1e-4, 0.9, 12, 0.3, 0.1),
}


def test_all_are_here():
    assert [path.stem for path in CONFIGS] == sorted(PUBLISHED, key=_place)


def _place(name):
    tree = "semantic_segmentation" if "upernet" in name else "object_detection"
    folder = "horfpn" if name.startswith(("fpn", "horfpn")) else "hornet"
    return f"{tree}/configs/{folder}/{name}.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    parameters, rate, decay, layers, drop_path, clip = PUBLISHED[path.stem]
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    registry = MMDET if config.default_scope == "mmdet" else MMSEG
    with torch.device("meta"):
        model = registry.build(config.model)
    if parameters:
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e6 == pytest.approx(parameters, abs=0.6)
    wrapper, backbone = config.optim_wrapper, config.model.backbone
    assert (wrapper.optimizer.type, wrapper.optimizer.lr) == ("AdamW", rate)
    assert wrapper.optimizer.weight_decay == 0.05
    assert wrapper.optimizer.betas == (0.9, 0.999)
    assert (wrapper.paramwise_cfg.decay_rate, wrapper.paramwise_cfg.num_layers) == (decay, layers)
    assert wrapper.get("clip_grad") == (None if clip is None else {"max_norm": clip})
    assert backbone.drop_path_rate == drop_path
    in22k = "large" in path.stem
    size, kind = backbone.arch.split("_")
    start = f"hornet_{size}_{kind}.{'in22k' if in22k else 'in1k'}"
    if start == "hornet_large_gf.in22k":
        start = "hornet_large_gf_img384.in22k"
    assert backbone.pretrained == start
    assert start in timm.list_pretrained()
    filters = [block.gnconv.dwconv for stage in model.backbone.stages for block in stage]
    sizes = {tuple(f.complex_weight.shape[1:3]) for f in filters if hasattr(f, "complex_weight")}
    large = config.default_scope == "mmseg" or in22k
    expected = {(24, 13), (12, 7)} if large else {(14, 8), (7, 4)}
    assert sizes == (expected if backbone.arch.endswith("gf") else set())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_schedule_and_data(path):
    config = Config.fromfile(path)
    warm_up, rest = config.param_scheduler
    assert config.train_dataloader.batch_size == 2
    if config.default_scope == "mmseg":
        side = 640 if "640" in path.stem else 512
        assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
        assert (rest.type, rest.power, rest.end, rest.eta_min) == ("PolyLR", 1, 160_000, 0)
        assert config.train_cfg.max_iters == 160_000
        assert config.optim_wrapper.paramwise_cfg.decay_type == "stage_wise"
        assert rest.begin == 1500
        assert config.model.test_cfg.mode == "slide"
        steps = {t.type: t for t in config.train_dataloader.dataset.pipeline}
        assert steps["RandomResize"].scale == (4 * side, side)
        assert steps["RandomResize"].ratio_range == (0.5, 2.0)
        assert steps["RandomFlip"].prob == 0.5
        assert "PhotoMetricDistortion" in steps
        assert config.model.test_cfg.stride == ((341, 341) if side == 512 else (426, 426))
        assert config.model.test_cfg.crop_size == config.model.data_preprocessor.size == (side,) * 2
        crops = [t for t in config.train_dataloader.dataset.pipeline if t.type == "RandomCrop"]
        assert crops[0].crop_size == (side, side)
        return
    epochs, steps = (36, [27, 33]) if "3x" in path.stem else (12, [8, 11])
    assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    assert (config.train_cfg.max_epochs, rest.milestones) == (epochs, steps)
    assert config.optim_wrapper.paramwise_cfg.decay_type == "layer_wise"
    flips = [t for t in config.train_dataloader.dataset.pipeline if t.type == "RandomFlip"]
    assert [flip.prob for flip in flips] == [0.5]
    if "3x" in path.stem:
        (choice,) = (
            t for t in config.train_dataloader.dataset.pipeline if t.type == "RandomChoice"
        )
        assert choice.transforms[0][0].scales == [(side, 1333) for side in range(480, 801, 32)]
        assert choice.transforms[1][0].scales == [(side, 1333) for side in (400, 500, 600)]
        assert choice.transforms[1][1].crop_size == (384, 600)
        assert choice.transforms[1][2] == choice.transforms[0][0]
        # those of Cascade R-CNN (Cai and Vasconcelos, 2018)
        assert [head.bbox_coder.target_stds for head in config.model.roi_head.bbox_head] == [
            [0.1, 0.1, 0.2, 0.2],
            [0.05, 0.05, 0.1, 0.1],
            [0.033, 0.033, 0.067, 0.067],
        ]
        for head in config.model.roi_head.bbox_head:
            assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ("GIoULoss", 10)
            assert (head.num_shared_convs, head.norm_cfg.type) == (4, "SyncBN")
            assert not head.reg_class_agnostic
            assert head.reg_decoded_bbox


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_rates_of_the_layers(path):
    """decay ** (layers + 1 - id), as the optimizer has them: the first and the last of the ids."""
    _, rate, decay, layers, _, _ = PUBLISHED[path.stem]
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    by_stage = config.default_scope == "mmseg"
    # the last block of stage 3 of 18 blocks is in the layer before the last (recorded ids)
    ids = {
        "backbone.downsample_layers.0.0.weight": 0,
        "backbone.downsample_layers.3.1.weight": 0 if by_stage else 12,
        "backbone.stages.0.0.gamma1": 1,
        "backbone.stages.2.17.gamma1": 3 if by_stage else 11,
        "backbone.stages.3.1.gamma1": 4 if by_stage else 12,
        "backbone.norm3.weight": layers + 1,
    }
    for name, layer in ids.items():
        assert rates[name] == pytest.approx(rate * decay ** (layers + 1 - layer)), name
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays["backbone.stages.0.0.gamma1"] == 0
    assert decays["backbone.stages.0.0.pwconv1.weight"] == 0.05


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_heads_of_the_configs(path):
    """Each says what came out, on what, and by which command."""
    comment = re.match(r"(?:#.*\n)+", path.read_text())[0]
    relative = path.relative_to(ROOT)
    assert f"bash {relative.parts[0]}/dist_train.sh {relative} 8" in comment
    assert "Hardware: 8 GPUs, 2 images each" in comment
    assert f"Start weights: ImageNet-{'22K' if 'large' in path.stem else '1K'}," in comment


@pytest.mark.parametrize(
    ("path", "lr", "decay", "undecayed"),
    [
        ("object_detection/configs/dino/dino_hornet_large_gf_36e_coco_in22k.py", 1e-4, 1e-4, ()),
        (
            "semantic_segmentation/configs/mask2former/mask2former_hornet_large_gf_640_160k_ade20k.py",
            1e-4,
            0.05,
            ("norm", "query_embed", "query_feat", "level_embed"),
        ),
    ],
)
def test_headline_results_have_the_settings_for_swin(path, lr, decay, undecayed):
    """A tenth of the rate for the backbone; where Swin's norms have no weight decay, nor ours."""
    config = Config.fromfile(ROOT / path)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert model.backbone.depths == (2, 3, 18, 2)
    logging.getLogger("mmengine").setLevel(logging.ERROR)  # a line for every parameter
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names)
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        for kind in ("weight", "bias")
    }
    for name, (rate, weight_decay) in found.items():
        assert rate == pytest.approx(lr / 10 if name.startswith("backbone.") else lr)
        kind = "norm" if name in norms else name.removesuffix(".weight").rpartition(".")[2]
        assert weight_decay == (0 if kind in undecayed else decay), name


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/configs/other_backbones/*.py")), ids=lambda path: path.stem
)
def test_other_backbones_have_gnconvs_in_their_decoders(path):
    """And nothing else differs from the configs of mmdet and mmseg."""
    is_detector = path.parts[-4] == "object_detection"
    config = Config.fromfile(path)
    init_default_scope("mmdet" if is_detector else "mmseg")
    part = "neck" if is_detector else "decode_head"
    given = config.model[part]
    assert {name: given.pop(name) for name in ("type", "order", "kernel_size")} == {
        "type": "HorFPN" if is_detector else "GNUPerHead", "order": 2, "kernel_size": 7,
    }  # fmt: skip
    (base,) = re.findall(r'(?:mmdet::|/\.mim/configs/)([^"]+)"', path.read_text())
    package = "mmdet" if is_detector else "mmseg"
    folder = Path(importlib.util.find_spec(package).origin).parent
    plain = Config.fromfile(folder / ".mim/configs" / base)
    del plain.model[part]["type"]
    config.model.pop("_scope_", None)  # from the name of the base
    assert config.model == plain.model
    registry = MMDET if is_detector else MMSEG
    model = registry.build(Config.fromfile(path).model)
    assert sum(isinstance(layer, GnConv) for layer in model.modules()) == (4 if is_detector else 1)
