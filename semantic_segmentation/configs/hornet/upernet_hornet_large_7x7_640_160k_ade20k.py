# UPerNet with HorNet-L 7x7: 54.1 mIoU (single scale), 54.5 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-22K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_large_7x7_640_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet_640.py"]

model = dict(
    backbone=dict(
        arch="large_7x7",
        drop_path_rate=0.4,
        pretrained="hornet_large_7x7.in22k",
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
