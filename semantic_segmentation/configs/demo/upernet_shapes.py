# A small UPerNet trained from scratch on drawn shapes, on a CPU: `make demo-segmentation` draws and trains.
_base_ = ["../finetune/upernet_own_data.py"]

data_root = "data/shapes-segmentation"
size = (128, 128)
max_iters = 1200

_bn = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(arch="atto_7x7", drop_path_rate=0.0, pretrained=None),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, norm_cfg=_bn),
    auxiliary_head=dict(in_channels=128, channels=32, norm_cfg=_bn),
    test_cfg=dict(crop_size=size, stride=(96, 96)),
)
_load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
train_pipeline = [*_load, dict(type="RandomFlip", prob=0.5), dict(type="PackSegInputs")]
test_pipeline = [*_load, dict(type="PackSegInputs")]
train_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, begin=50, end=max_iters, eta_min=0.0, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
