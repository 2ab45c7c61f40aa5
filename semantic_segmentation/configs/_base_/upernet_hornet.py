# ADE20K in crops of 512 x 512 pixels.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/datasets/ade20k.py",
    "./upernet_hornet_160k.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    test_cfg=dict(crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
