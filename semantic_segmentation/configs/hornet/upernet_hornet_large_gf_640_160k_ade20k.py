# UPerNet with HorNet-L GF: 55.0 mIoU (single scale), 55.2 (multi-scale and flip) on ADE20K val, as published.
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-22K ones that the release fine-tuned from, downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_large_gf_640_160k_ade20k.py 8
_base_ = ["../_base_/upernet_hornet_640.py"]

model = dict(
    backbone=dict(
        arch="large_gf",
        drop_path_rate=0.4,
        global_filters=(None, None, (24, 13), (12, 7)),
        with_cp=True,
        pretrained="https://cloud.tsinghua.edu.cn/f/9253bd0d50c84ab1b71e/?dl=1",
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8), clip_grad=dict(max_norm=0.1))
