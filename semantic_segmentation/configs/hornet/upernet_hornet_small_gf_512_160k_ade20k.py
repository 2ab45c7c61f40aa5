# UPerNet with HorNet-S GF: 50.0 mIoU (single scale), 50.5 (multi-scale and flip) on ADE20K val, as published.
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-1K ones that the release fine-tuned from, downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_small_gf_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="small_gf",
        drop_path_rate=0.3,
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="https://cloud.tsinghua.edu.cn/f/8405c984bf084d2ba85a/?dl=1",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(clip_grad=dict(max_norm=1))
