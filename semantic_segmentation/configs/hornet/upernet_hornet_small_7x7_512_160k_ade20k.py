# UPerNet with HorNet-S 7x7: 49.2 mIoU (single scale), 49.8 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_small_7x7_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="small_7x7",
        drop_path_rate=0.3,
        pretrained="hornet_small_7x7.in1k",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
