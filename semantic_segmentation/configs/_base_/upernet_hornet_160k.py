# UPerNet for the 150 classes of ADE20K, sliding-window testing. 160,000 iterations on 8 GPUs with 2 images each:
# a learning rate per stage, a warm-up of 1500 iterations, then linear decay to 0.
# (mmengine does not find mmseg:: under the fork's name, hence the paths.)
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/models/upernet_r50.py",
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/schedules/schedule_160k.py",
]
custom_imports = dict(
    imports=["dense.backbone", "dense.folders", "dense.upernet", "dense.layer_decay"]
)

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="HorNet"),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode="slide"),
)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LearningRateDecayOptimizerConstructorHorNet",
    paramwise_cfg=dict(decay_rate=0.9, decay_type="stage_wise", num_layers=12),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, begin=1500, end=160000, eta_min=0.0, by_epoch=False),
]
# validation runs every 16,000 iterations; saving every 2,000 limits what a kill loses
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=3, save_best="mIoU"))
auto_scale_lr = dict(enable=False, base_batch_size=16)
