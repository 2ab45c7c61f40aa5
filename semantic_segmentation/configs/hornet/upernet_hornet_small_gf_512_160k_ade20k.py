# UPerNet with HorNet-S GF: 50.0 mIoU (single scale), 50.5 (multi-scale and flip) on ADE20K val (published).
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/hornet/upernet_hornet_small_gf_512_160k_ade20k.py 8
_base_ = ["./upernet_hornet_small_7x7_512_160k_ade20k.py"]

model = dict(
    backbone=dict(
        arch="small_gf",
        global_filters=(None, None, (24, 13), (12, 7)),
        pretrained="hornet_small_gf.in1k",
    )
)
optim_wrapper = dict(clip_grad=dict(max_norm=1))
