# UPerNet for the 150 classes of ADE20K, tested by sliding windows.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/models/upernet_r50.py",
    "./schedule_160k.py",
]

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="HorNet"),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode="slide"),
)
