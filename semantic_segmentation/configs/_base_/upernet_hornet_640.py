# ADE20K in crops of 640 x 640 pixels.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/datasets/ade20k_640x640.py",
    "./upernet_hornet_160k.py",
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    test_cfg=dict(crop_size=(640, 640), stride=(426, 426)),
)
train_dataloader = dict(batch_size=2)
