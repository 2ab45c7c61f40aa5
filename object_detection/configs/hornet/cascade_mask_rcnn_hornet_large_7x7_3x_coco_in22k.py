# Cascade Mask R-CNN with HorNet-L 7x7: 55.4 box AP, 48.0 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-22K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_large_7x7_3x_coco_in22k.py 8
_base_ = ["../_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        arch="large_7x7",
        drop_path_rate=0.7,
        pretrained="hornet_large_7x7.in22k",
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
