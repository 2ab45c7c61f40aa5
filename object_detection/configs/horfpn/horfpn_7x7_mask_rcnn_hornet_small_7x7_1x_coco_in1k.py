# Mask R-CNN 1x with HorNet-S 7x7 and a HorFPN of 7x7 gnConvs: the paper's ablation of feature pyramids.
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/horfpn/horfpn_7x7_mask_rcnn_hornet_small_7x7_1x_coco_in1k.py 8
_base_ = ["./fpn_mask_rcnn_hornet_small_7x7_1x_coco_in1k.py"]

model = dict(neck=dict(type="HorFPN", order=2, kernel_size=7))
