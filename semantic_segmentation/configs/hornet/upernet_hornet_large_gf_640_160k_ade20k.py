# UPerNet with HorNet-L GF: 55.0 mIoU (single scale), 55.2 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-22K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_large_gf_640_160k_ade20k.py 8
_base_ = ["./upernet_hornet_large_7x7_640_160k_ade20k.py"]

model = dict(
    backbone=dict(
        arch="large_gf",
        global_filters=(None, None, (24, 13), (12, 7)),
        with_cp=True,
        pretrained="hornet_large_gf_img384.in22k",
    )
)
optim_wrapper = dict(clip_grad=dict(max_norm=0.1))
