# Cascade Mask R-CNN with HorNet-L GF: 56.0 box AP, 48.6 mask AP on COCO val, as published.
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-22K ones that the release fine-tuned from, downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_large_gf_3x_coco_in22k.py 8
_base_ = ["../_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        arch="large_gf",
        drop_path_rate=0.7,
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="https://cloud.tsinghua.edu.cn/f/9253bd0d50c84ab1b71e/?dl=1",
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
