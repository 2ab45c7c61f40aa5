# UPerNet with HorNet-T GF: 49.2 mIoU (single scale), 49.3 (multi-scale and flip) on ADE20K val, as published.
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-1K ones that the release fine-tuned from, downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_tiny_gf_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="tiny_gf",
        drop_path_rate=0.4,
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="https://cloud.tsinghua.edu.cn/f/511faad0bde94dfcaa54/?dl=1",
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(num_layers=6), clip_grad=dict(max_norm=1))
