# UPerNet with HorNet-B GF: 50.5 mIoU (single scale), 50.9 (multi-scale and flip) on ADE20K val, as published.
# (The release's table says crops of 640 pixels; its config, and this one, has 512.)
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-1K ones that the release fine-tuned from, downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_base_gf_512_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet.py"]

model = dict(
    backbone=dict(
        arch="base_gf",
        drop_path_rate=0.5,
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="https://cloud.tsinghua.edu.cn/f/6c84935e63b547f383fb/?dl=1",
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(clip_grad=dict(max_norm=1))
