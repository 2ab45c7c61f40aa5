"""The released configs: every one builds, with the published parameters and hyperparameters."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as MMDET
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS as MMSEG

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("*/configs/hor*/*.py"))
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
    assert (wrapper.paramwise_cfg.decay_rate, wrapper.paramwise_cfg.num_layers) == (decay, layers)
    assert wrapper.get("clip_grad") == (None if clip is None else {"max_norm": clip})
    assert backbone.drop_path_rate == drop_path
    in22k = "large" in path.stem
    assert backbone.pretrained == f"hornet_{backbone.arch}.{'in22k' if in22k else 'in1k'}"
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
        assert config.model.test_cfg.stride == ((341, 341) if side == 512 else (426, 426))
        assert config.model.test_cfg.crop_size == config.model.data_preprocessor.size == (side,) * 2
        crops = [t for t in config.train_dataloader.dataset.pipeline if t.type == "RandomCrop"]
        assert crops[0].crop_size == (side, side)
        return
    epochs, steps = (36, [27, 33]) if "3x" in path.stem else (12, [8, 11])
    assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    assert (config.train_cfg.max_epochs, rest.milestones) == (epochs, steps)
    assert config.optim_wrapper.paramwise_cfg.decay_type == "layer_wise"
    if "3x" in path.stem:
        (choice,) = (
            t for t in config.train_dataloader.dataset.pipeline if t.type == "RandomChoice"
        )
        assert choice.transforms[0][0].scales == [(side, 1333) for side in range(480, 801, 32)]
        assert choice.transforms[1][1].crop_size == (384, 600)
        for head in config.model.roi_head.bbox_head:
            assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ("GIoULoss", 10)
            assert (head.num_shared_convs, head.norm_cfg.type) == (4, "SyncBN")
            assert not head.reg_class_agnostic
            assert head.reg_decoded_bbox


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_heads_of_the_configs(path):
    """Each says what came out, on what, and by which command."""
    comment = re.match(r"(?:#.*\n)+", path.read_text())[0]
    relative = path.relative_to(ROOT)
    assert f"bash {relative.parts[0]}/dist_train.sh {relative} 8" in comment
    assert "Hardware: 8 GPUs, 2 images each" in comment
    assert Config.fromfile(path).model.backbone.pretrained in comment
