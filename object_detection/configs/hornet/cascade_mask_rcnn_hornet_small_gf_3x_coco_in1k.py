# Cascade Mask R-CNN with HorNet-S GF: 53.3 box AP, 46.3 mask AP on COCO val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/hornet/cascade_mask_rcnn_hornet_small_gf_3x_coco_in1k.py 8
_base_ = ["./cascade_mask_rcnn_hornet_small_7x7_3x_coco_in1k.py"]

model = dict(backbone=dict(arch="small_gf", pretrained="hornet_small_gf.in1k"))
