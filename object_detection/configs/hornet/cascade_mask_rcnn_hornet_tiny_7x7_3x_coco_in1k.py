# Cascade Mask R-CNN with HorNet-T 7x7: 51.7 box AP, 44.8 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_tiny_7x7_3x_coco_in1k.py 8
_base_ = ["../_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        arch="tiny_7x7",
        drop_path_rate=0.4,
        pretrained="hornet_tiny_7x7.in1k",
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
