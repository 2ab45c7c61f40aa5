# UPerNet with HorNet-T on your own images and masks. Copy this file and edit the first lines:
#
#   data_root/train/images/NAME.*   data_root/train/masks/NAME.png   data_root/val/...
#
# Masks have one channel; their values are indices of `classes`, or 255 for pixels without a label.
#
#   python -m semantic_segmentation.train semantic_segmentation/configs/finetune/upernet_own_data.py
#
# For one GPU and batches of 4 crops; --auto-scale-lr scales the learning rate to other batch sizes.
_base_ = ["../_base_/upernet_hornet.py"]

data_root = "data/mine"
classes = ("ground", "disc", "square", "triangle")
palette = [[0, 0, 0], [220, 60, 60], [60, 180, 75], [60, 90, 220]]  # colors in pictures
mask_suffix = ".png"
max_iters = 20000
warmup_iters = max(1, max_iters // 40)

model = dict(
    backbone=dict(arch="tiny_7x7", drop_path_rate=0.2, pretrained="hornet_tiny_7x7.in1k"),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=len(classes)),
    auxiliary_head=dict(in_channels=256, num_classes=len(classes)),
)


def _part(name, pipeline):
    return dict(
        _delete_=True,
        type="FolderSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path=f"{name}/images", seg_map_path=f"{name}/masks"),
        seg_map_suffix=mask_suffix,
        metainfo=dict(classes=classes, palette=palette),
        pipeline=pipeline,
    )


train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4, dataset=_part("train", train_pipeline))
val_dataloader = dict(dataset=_part("val", test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warmup_iters),
    dict(type="PolyLR", power=1.0, begin=warmup_iters, end=max_iters, eta_min=0.0, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=2, save_best="mIoU"))
auto_scale_lr = dict(base_batch_size=4)
