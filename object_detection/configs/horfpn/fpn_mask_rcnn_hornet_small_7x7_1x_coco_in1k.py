# Mask R-CNN 1x with HorNet-S 7x7 and a plain FPN: the paper's ablation of feature pyramids.
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/horfpn/fpn_mask_rcnn_hornet_small_7x7_1x_coco_in1k.py 8
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "../_base_/coco_hornet.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="HorNet",
        arch="small_7x7",
        drop_path_rate=0.6,
        pretrained="hornet_small_7x7.in1k",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
# as released: num_layers is 6 although layer ids go up to 12, so the last layers of the backbone have
# up to 1.29 times the base learning rate (0.95 ** -5)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
