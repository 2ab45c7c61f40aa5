# mmdet's Mask R-CNN with ResNet-101, and a HorFPN of 7x7 gnConvs instead of its FPN. Not trained by this project.
#
#   bash object_detection/dist_train.sh object_detection/configs/other_backbones/horfpn_7x7_mask_rcnn_resnet101_1x_coco.py 8
_base_ = ["mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py"]
custom_imports = dict(imports=["dense.fpn"])

model = dict(neck=dict(type="HorFPN", order=2, kernel_size=7))
