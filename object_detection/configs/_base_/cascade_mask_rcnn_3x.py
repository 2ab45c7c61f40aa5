# Cascade Mask R-CNN, 36 epochs (learning rate drops at 27 and 33), multi-scale training as in DETR and
# Sparse R-CNN. Box heads have 4 convolutions with SyncBN, 1 fully connected layer, and GIoU loss.
_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./coco_hornet.py"]


def _box_head(deviations):
    return dict(
        type="ConvFCBBoxHead",
        num_shared_convs=4,
        num_shared_fcs=1,
        num_classes=80,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=deviations),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )


model = dict(
    backbone=dict(_delete_=True, type="HorNet"),
    roi_head=dict(
        bbox_head=[
            _box_head([0.1, 0.1, 0.2, 0.2]),
            _box_head([0.05, 0.05, 0.1, 0.1]),
            _box_head([0.033, 0.033, 0.067, 0.067]),
        ]
    ),
)


def _resize_to(sides):
    return dict(type="RandomChoiceResize", scales=[(side, 1333) for side in sides], keep_ratio=True)


_resize = _resize_to(range(480, 801, 32))
_crop = dict(
    type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice", transforms=[[_resize], [_resize_to([400, 500, 600]), _crop, _resize]]
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
