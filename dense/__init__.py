"""Shared by detection and segmentation: what configs of mmdet and mmseg name, training and testing.

Configs list what they need in `custom_imports`: dense.backbone, dense.layer_decay, dense.fpn
(mmdet), dense.upernet (mmseg), dense.gnconv. `make dense` installs the mm stack.
"""
