# Mask2Former with HorNet-L: 57.9 mIoU on ADE20K val (published, but the config was never released). This config is
# ours, and untrained: mmseg's Mask2Former for Swin-L with HorNet-L as the backbone.
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-22K, downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/mask2former/mask2former_hornet_large_gf_640_160k_ade20k.py 8
_base_ = [
    __import__("mmseg").__path__[0]
    + "/.mim/configs/mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py"
]
custom_imports = dict(imports=["mmdet.models", "dense.backbone"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="HorNet",
        arch="large_gf",
        drop_path_rate=0.3,
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="hornet_large_gf_img384.in22k",
    ),
)

# the base config has a tenth of the learning rate for the backbone, and no weight decay for norms; but it names only
# those of Swin, and the key "backbone" overrides norm_decay_mult
_blocks = [(stage, block) for stage, depth in enumerate((2, 3, 18, 2)) for block in range(depth)]
_norms = [
    "backbone.downsample_layers.0.1",
    *(f"backbone.downsample_layers.{stage}.0" for stage in (1, 2, 3)),
    *(f"backbone.stages.{stage}.{block}.norm" for stage, block in _blocks),
    "gnconv.dwconv.pre_norm",
    "gnconv.dwconv.post_norm",
]
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={name: dict(lr_mult=0.1, decay_mult=0.0) for name in _norms})
)
