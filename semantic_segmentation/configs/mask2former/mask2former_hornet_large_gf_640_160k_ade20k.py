# Mask2Former with HorNet-L: 57.9 mIoU on ADE20K val, as published, from a config that was never released. This
# one is ours: mmseg's Mask2Former for Swin-L with HorNet-L in its place. It has not been trained.
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
        pretrained="https://cloud.tsinghua.edu.cn/f/9253bd0d50c84ab1b71e/?dl=1",
    ),
)

# as for Swin: a tenth of the rate for the backbone; no weight decay for its norms and for the queries
_blocks = [(stage, block) for stage, depth in enumerate((2, 3, 18, 2)) for block in range(depth)]
_norms = [
    *(f"backbone.norm{stage}" for stage in range(4)),
    "backbone.downsample_layers.0.1",
    *(f"backbone.downsample_layers.{stage}.0" for stage in (1, 2, 3)),
    *(f"backbone.stages.{stage}.{block}.norm" for stage, block in _blocks),
    *(
        f"backbone.stages.{stage}.{block}.gnconv.dwconv.{place}_norm"
        for stage, block in _blocks
        for place in ("pre", "post")
    ),
]
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            "backbone": dict(lr_mult=0.1, decay_mult=1.0),
            **{name: dict(lr_mult=0.1, decay_mult=0.0) for name in _norms},
            **{
                name: dict(lr_mult=1.0, decay_mult=0.0)
                for name in ("query_embed", "query_feat", "level_embed")
            },
        },
        norm_decay_mult=0.0,
    )
)
