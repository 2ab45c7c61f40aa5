# UPerNet with HorNet-T GF: 49.2 mIoU (single scale), 49.3 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_tiny_gf_512_160k_ade20k.py 8
_base_ = ["./upernet_hornet_tiny_7x7_512_160k_ade20k.py"]

model = dict(
    backbone=dict(
        arch="tiny_gf",
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="hornet_tiny_gf.in1k",
    )
)
optim_wrapper = dict(clip_grad=dict(max_norm=1))
