"""HorNet as a backbone of mmdet and mmseg: feature maps at strides 4, 8, 16 and 32.

Parameter names are those of the released detectors and segmentors: the classifier's without its
norm and head, and a norm per output (norm0 to norm3).
"""

import re
from collections.abc import Sequence
from typing import Any

import timm
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor

import models
from checkpoints import fitting, reading
from dense.loading import fetched
from models.hornet import NORM_EPS
from runtime.errors import UserError

SMALLEST = 32
"""The stride of the last stage, in pixels."""


@MODELS.register_module()
class HorNet(BaseModule):
    """The stages of a HorNet, with a norm per output.

    Images (B, 3, H, W) -> contiguous maps (B, C * 2**i, H / 2**(i + 2), W / 2**(i + 2)) for each i
    in out_indices, sizes rounded down, normalized over the channels. Raises UserError if there is
    no such variant, or (init_weights) the start weights don't fit.

    Args:
        arch: Variant without 'hornet_', such as 'tiny_7x7' or 'large_gf' (models/variants.py).
        layer_scale_init_value: Initial layer scale; 1.0 as in the released configs.
        with_cp: Recompute each block in the backward pass instead of storing its activations.
        frozen_stages: Index of the last frozen stage; -1 freezes nothing.
        pretrained: Start weights: a path, URL or published name. As usual in mmdet,
            init_cfg=dict(type='Pretrained', checkpoint=...) works, too.
        kwargs: Further arguments of models.HorNet, such as drop_path_rate and global_filters.
    """

    def __init__(
        self,
        arch: str = "tiny_7x7",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        layer_scale_init_value: float = 1.0,
        with_cp: bool = False,
        frozen_stages: int = -1,
        pretrained: str | None = None,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise UserError(
                f"backbone HorNet: init_cfg {init_cfg}: give dict(type='Pretrained', "
                "checkpoint=...), or pretrained"
            )
        self.pretrained = init_cfg["checkpoint"] if init_cfg else pretrained
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        name = f"hornet_{arch}"
        if not timm.is_model(name):
            known = ", ".join(n.removeprefix("hornet_") for n in timm.list_models("hornet_*"))
            raise UserError(f"backbone HorNet: there is no arch {arch!r}; choose one of {known}")
        try:
            network: Any = timm.create_model(
                name, num_classes=0, layer_scale_init_value=layer_scale_init_value, **kwargs
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"backbone HorNet: {error}") from None
        count = len(network.stages)
        if not -1 <= frozen_stages < count:
            raise UserError(
                f"backbone HorNet: frozen_stages {frozen_stages}: from -1 to {count - 1}"
            )
        if not self.out_indices or not all(0 <= index < count for index in self.out_indices):
            raise UserError(
                f"backbone HorNet: out_indices {self.out_indices}: from 0 to {count - 1}"
            )
        network.set_grad_checkpointing(with_cp)
        self.depths = network.depths
        self.downsample_layers = network.downsample_layers
        self.stages = network.stages
        for index in self.out_indices:
            norm = LayerNorm2d(network.feature_info[index]["num_chs"], eps=NORM_EPS)
            self.add_module(f"norm{index}", norm)
        self.train()  # freezes stages before DDP or an optimizer collects the parameters

    @property
    def widths(self) -> list[int]:
        """The channels of the outputs."""
        return [len(self.get_submodule(f"norm{index}").weight) for index in self.out_indices]

    group_matcher = models.HorNet.group_matcher  # for layer decay

    def init_weights(self) -> None:
        """Load the start weights, if any; the constructor has initialized everything."""
        if not self.pretrained:
            return
        path = fetched(self.pretrained)
        found = reading.weights_in(reading.read_checkpoint(path), path)
        # left out: neck and heads of a detector, last norm and head of a classifier
        backbone = {k: v for k, v in found.items() if k.startswith("backbone.")} or found
        weights = models.checkpoint_filter_fn(backbone, self)
        weights = {k: v for k, v in weights.items() if not re.match(r"(norm|head)\.", k)}
        norms = frozenset(name for name in self.state_dict() if re.match(r"norm\d\.", name))
        fitting.load_exactly(self, weights, path, may_lack=norms)
        print_log(f"start weights of the backbone from {path}", "current")

    def train(self, mode: bool = True) -> "HorNet":
        """Set the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for index in range(self.frozen_stages + 1):
            self.downsample_layers[index].eval().requires_grad_(False)
            self.stages[index].eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[-2:]
        if min(height, width) < SMALLEST:
            raise UserError(
                f"an image of {width} x {height} pixels: both sides need {SMALLEST}; enlarge it in "
                f"the pipeline, or give model.data_preprocessor.test_cfg.size_divisor={SMALLEST}"
            )
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(self.downsample_layers[index](x))
            if index in self.out_indices:
                norm = self.get_submodule(f"norm{index}")
                maps.append(norm(x).contiguous())  # mmcv's RoIAlign misreads channels_last
        return tuple(maps)
