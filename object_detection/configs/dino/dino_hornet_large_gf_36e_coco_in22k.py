# DINO with HorNet-L: 59.2 box AP on COCO val (published, but the config was never released). This config is ours,
# and untrained: mmdet's DINO for Swin-L (5 scales, 36 epochs) with HorNet-L as the backbone.
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-22K, downloaded on first use.
#
#   bash object_detection/dist_train.sh object_detection/configs/dino/dino_hornet_large_gf_36e_coco_in22k.py 8
_base_ = ["mmdet::dino/dino-5scale_swin-l_8xb2-36e_coco.py"]
custom_imports = dict(imports=["dense.backbone"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="HorNet",
        arch="large_gf",
        drop_path_rate=0.2,
        global_filters=(None, None, (24, 13), (12, 7)),
        with_cp=True,
        pretrained="hornet_large_gf_img384.in22k",
    ),
)
