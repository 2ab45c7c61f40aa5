# UPerNet with HorNet-S 7x7 whose final fusion is a gnConv (7x7): the paper's ablation.
# Hardware: 8 GPUs, 2 images each. Start weights: ImageNet-1K, as in the release; downloaded on first use.
#
#   bash semantic_segmentation/dist_train.sh semantic_segmentation/configs/horfpn/horfpn_7x7_upernet_hornet_small_7x7_512_160k_ade20k.py 8
_base_ = ["../hornet/upernet_hornet_small_7x7_512_160k_ade20k.py"]

model = dict(decode_head=dict(type="GNUPerHead", order=2, kernel_size=7))
