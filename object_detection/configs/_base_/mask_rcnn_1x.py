# Mask R-CNN, 12 epochs (steps at 8 and 11), with HorNet-S 7x7: the ablation of feature pyramids.
# Layer decay as released: num_layers 6 with ids up to 12, so that the last layers of the backbone
# have rates above the base rate (0.95 ** -5 = 1.29 times).
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./coco_hornet.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="HorNet",
        arch="small_7x7",
        drop_path_rate=0.6,
        pretrained="https://cloud.tsinghua.edu.cn/f/46422799db2941f7b684/?dl=1",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
