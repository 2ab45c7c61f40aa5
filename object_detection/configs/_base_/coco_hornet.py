# Shared by all detectors: COCO, 8 GPUs with 2 images each, AdamW with layer decay.
_base_ = [
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["dense.backbone", "dense.fpn", "dense.layer_decay"])

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LearningRateDecayOptimizerConstructorHorNet",
    paramwise_cfg=dict(decay_rate=0.7, decay_type="layer_wise", num_layers=12),
)
