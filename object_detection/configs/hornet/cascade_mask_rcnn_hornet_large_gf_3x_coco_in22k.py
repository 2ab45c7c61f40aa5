# Cascade Mask R-CNN with HorNet-L GF: 56.0 box AP, 48.6 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-22K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_large_gf_3x_coco_in22k.py 8
_base_ = ["./cascade_mask_rcnn_hornet_large_7x7_3x_coco_in22k.py"]

model = dict(
    backbone=dict(
        arch="large_gf",
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="hornet_large_gf_img384.in22k",
    )
)
