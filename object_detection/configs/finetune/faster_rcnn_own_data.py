# Faster R-CNN (boxes only) with HorNet-T on your own data in COCO format; segmentations are not read.
# Copy this file and mask_rcnn_own_data.py, its base, and edit the first lines of the base.
#
#   python -m object_detection.train object_detection/configs/finetune/faster_rcnn_own_data.py
_base_ = ["./mask_rcnn_own_data.py"]

model = dict(type="FasterRCNN", roi_head=dict(mask_roi_extractor=None, mask_head=None))

_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
]
train_pipeline = [*_pipeline, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test_pipeline = [*_pipeline, dict(type="PackDetInputs")]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
