# UPerNet with HorNet-T 7x7: 48.1 mIoU (single scale), 48.9 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_tiny_7x7_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="tiny_7x7",
        drop_path_rate=0.4,
        pretrained="hornet_tiny_7x7.in1k",
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(num_layers=6))
