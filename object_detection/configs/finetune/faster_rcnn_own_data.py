# Faster R-CNN (boxes only) with HorNet-T on your own data in COCO format; segmentations are not read.
# Copy this file and mask_rcnn_own_data.py, its base, name the copy of the latter as _base_, and edit
# its first lines.
#
#   python -m object_detection.train object_detection/configs/finetune/faster_rcnn_own_data.py
_base_ = ["./mask_rcnn_own_data.py"]

model = dict(type="FasterRCNN", roi_head=dict(mask_roi_extractor=None, mask_head=None))

_image = dict(type="LoadImageFromFile")
_boxes = dict(type="LoadAnnotations", with_bbox=True)
_resize = dict(type="Resize", scale=(1333, 800), keep_ratio=True)
_pack = dict(type="PackDetInputs")
train_pipeline = [_image, _boxes, _resize, dict(type="RandomFlip", prob=0.5), _pack]
test_pipeline = [_image, _resize, _boxes, _pack]  # boxes of the image itself, for pictures
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
