"""HorNet for detection and segmentation: the parts that mmdet's and mmseg's configs name.

A config imports what it needs by `custom_imports`: dense.backbone, dense.layer_decay, dense.fpn
(mmdet), dense.upernet (mmseg). `make dense` installs the mm stack.
"""
