"""The models for torch.hub.load('path or repository', 'hornet_tiny_gf', pretrained=True, ...)."""

from models.variants import ENTRYPOINTS as _ENTRYPOINTS

dependencies = ["torch", "timm"]
globals().update(_ENTRYPOINTS)
