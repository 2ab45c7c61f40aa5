# Cascade Mask R-CNN with HorNet-S 7x7: 52.7 box AP, 45.6 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_small_7x7_3x_coco_in1k.py 8
_base_ = ["../_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        arch="small_7x7",
        drop_path_rate=0.6,
        pretrained="hornet_small_7x7.in1k",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
