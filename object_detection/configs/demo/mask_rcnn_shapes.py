# A small Mask R-CNN trained from scratch on drawn shapes, on a CPU: `make demo-detection` draws and trains.
_base_ = ["../finetune/mask_rcnn_own_data.py"]

data_root = "data/shapes-detection"
size = (128, 128)
max_epochs = 6

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(arch="atto_7x7", drop_path_rate=0.0, pretrained=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        mask_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_head=dict(in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(max_per_img=100)),
)
_image = dict(type="LoadImageFromFile")
_truth = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
_resize = dict(type="Resize", scale=size, keep_ratio=True)
_pack = dict(type="PackDetInputs")
train_pipeline = [_image, _truth, _resize, dict(type="RandomFlip", prob=0.5), _pack]
test_pipeline = [_image, _resize, _truth, _pack]
train_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f"{data_root}/val/annotations.json")
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
