# Cascade Mask R-CNN with HorNet-T GF: 52.4 box AP, 45.6 mask AP on COCO val, as published.
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-1K ones that the release fine-tuned from, downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_tiny_gf_3x_coco_in1k.py 8
_base_ = ["../_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        arch="tiny_gf",
        drop_path_rate=0.4,
        pretrained="https://cloud.tsinghua.edu.cn/f/511faad0bde94dfcaa54/?dl=1",
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
