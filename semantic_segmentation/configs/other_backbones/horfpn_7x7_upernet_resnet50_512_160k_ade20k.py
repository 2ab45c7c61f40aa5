# mmseg's UPerNet with ResNet-50, whose final fusion is a gnConv (7x7). Not trained by this project.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/other_backbones/horfpn_7x7_upernet_resnet50_512_160k_ade20k.py 8
_base_ = [
    __import__("mmseg").__path__[0]
    + "/.mim/configs/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
]
custom_imports = dict(imports=["dense.upernet"])

model = dict(decode_head=dict(type="GNUPerHead", order=2, kernel_size=7))
