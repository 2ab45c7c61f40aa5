# Cascade Mask R-CNN with HorNet-B 7x7: 53.3 box AP, 46.1 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_base_7x7_3x_coco_in1k.py 8
_base_ = ["../_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        arch="base_7x7",
        drop_path_rate=0.7,
        pretrained="hornet_base_7x7.in1k",
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
