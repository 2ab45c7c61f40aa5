# UPerNet with HorNet-B 7x7: 50.0 mIoU (single scale), 50.5 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_base_7x7_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="base_7x7",
        drop_path_rate=0.4,
        pretrained="hornet_base_7x7.in1k",
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
