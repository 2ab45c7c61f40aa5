# Mask R-CNN with HorNet-S 7x7 and a plain FPN: the paper's ablation of feature pyramids.
# Hardware: 8 GPUs, 2 images each. Start weights: the ImageNet-1K ones that the release fine-tuned from, downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/horfpn/fpn_mask_rcnn_hornet_small_7x7_1x_coco_in1k.py 8
_base_ = ["../_base_/mask_rcnn_1x.py"]
