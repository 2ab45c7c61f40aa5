# Cascade Mask R-CNN with HorNet-B GF: 54.0 box AP, 46.9 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_base_gf_3x_coco_in1k.py 8
_base_ = ["./cascade_mask_rcnn_hornet_base_7x7_3x_coco_in1k.py"]

model = dict(backbone=dict(arch="base_gf", pretrained="hornet_base_gf.in1k"))
