# mmdet's Mask R-CNN with Swin-S, and a HorFPN of 7x7 gnConvs instead of its FPN. Not trained by this project.
#
#   bash object_detection/dist_train.sh object_detection/configs/other_backbones/horfpn_7x7_mask_rcnn_swin_small_3x_coco.py 8
_base_ = ["mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py"]
custom_imports = dict(imports=["dense.fpn"])

model = dict(neck=dict(type="HorFPN", order=2, kernel_size=7))
