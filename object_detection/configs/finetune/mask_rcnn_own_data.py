# Mask R-CNN with HorNet-T on your own data in COCO format. Copy this file and edit the first lines:
#
#   data_root/train/annotations.json   data_root/train/images/   data_root/val/...
#
#   python -m object_detection.train object_detection/configs/finetune/mask_rcnn_own_data.py
#
# For one GPU and batches of 4 images; --auto-scale-lr scales the learning rate to other batch sizes.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "../_base_/coco_hornet.py"]

data_root = "data/mine"
classes = ("disc", "square", "triangle")  # the categories of annotations.json, in its order
max_epochs = 12

model = dict(
    backbone=dict(
        _delete_=True,
        type="HorNet",
        arch="tiny_7x7",
        drop_path_rate=0.2,
        pretrained="hornet_tiny_7x7.in1k",
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))
    ),
)
_train = dict(
    data_root=data_root,
    ann_file="train/annotations.json",
    data_prefix=dict(img="train/images/"),
    metainfo=dict(classes=classes),
    filter_cfg=dict(filter_empty_gt=False),  # images without objects are examples of background
)
_val = dict(
    data_root=data_root,
    ann_file="val/annotations.json",
    data_prefix=dict(img="val/images/"),
    metainfo=dict(classes=classes),
)
train_dataloader = dict(batch_size=4, dataset=_train)
val_dataloader = dict(dataset=_val)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f"{data_root}/val/annotations.json")
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best="auto"))
auto_scale_lr = dict(base_batch_size=4)
