# UPerNet with HorNet-S GF: 50.0 mIoU (single scale), 50.5 (multi-scale and flip) on ADE20K val, as published.
# Hardware: 8 GPUs, 2 images each. Start weights: hornet_small_gf.in1k, downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_small_gf_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="small_gf",
        drop_path_rate=0.3,
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="hornet_small_gf.in1k",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(clip_grad=dict(max_norm=1))
