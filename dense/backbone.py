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
from checkpoints.fitting import load_exactly
from checkpoints.reading import read_checkpoint, weights_in
from dense.loading import fetched
from models.hornet import NORM_EPS
from runtime.errors import UserError


@MODELS.register_module()
class HorNet(BaseModule):
    """The stages of a HorNet, with a norm per output.

    Images (B, 3, H, W) -> contiguous maps (B, C * 2**i, H / 2**(i + 2), W / 2**(i + 2)) for each i
    in out_indices, sizes rounded down, normalized over the channels.

    Args:
        arch: Variant without 'hornet_', such as 'tiny_7x7' or 'large_gf' (models/variants.py).
        out_indices: Stages with an output.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        layer_scale_init_value: Initial layer scale; 1.0 as in the released configs.
        global_filters: Per stage (h, w) of its global filters, or None; the variant's by default.
            Filters are resized to each map.
        with_cp: Recompute each block in the backward pass instead of storing its activations.
        frozen_stages: Index of the last frozen stage; -1 freezes nothing.
        pretrained: Start weights: a path, URL or published name. As usual in mmdet,
            init_cfg=dict(type='Pretrained', checkpoint=...) works, too.
        kwargs: Further arguments of the model, such as base_dim and depths.

    Raises:
        UserError: there is no such variant, or (init_weights) the start weights don't fit.
    """

    def __init__(
        self,
        arch: str = "tiny_7x7",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1.0,
        global_filters: Sequence[tuple[int, int] | None] | None = None,
        with_cp: bool = False,
        frozen_stages: int = -1,
        pretrained: str | None = None,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            if init_cfg.get("type") != "Pretrained":
                raise UserError(
                    f"backbone HorNet: init_cfg {init_cfg}: give dict(type='Pretrained', "
                    "checkpoint=...), or pretrained"
                )
            pretrained = init_cfg["checkpoint"]
        self.pretrained = pretrained
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        name = f"hornet_{arch}"
        if not timm.is_model(name):
            known = ", ".join(n.removeprefix("hornet_") for n in timm.list_models("hornet_*"))
            raise UserError(f"backbone HorNet: there is no arch {arch!r}; choose one of {known}")
        if global_filters is not None:
            kwargs["global_filters"] = global_filters
        try:
            network: models.HorNet = timm.create_model(  # type: ignore[assignment]
                name,
                num_classes=0,
                drop_path_rate=drop_path_rate,
                layer_scale_init_value=layer_scale_init_value,
                **kwargs,
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"backbone HorNet: {error}") from None
        network.set_grad_checkpointing(with_cp)
        self.depths = network.depths
        self.downsample_layers = network.downsample_layers
        self.stages = network.stages
        for index in self.out_indices:
            channels = network.feature_info[index]["num_chs"]
            self.add_module(f"norm{index}", LayerNorm2d(channels, eps=NORM_EPS))
        self.train()  # freezes stages before DDP or an optimizer collects the parameters

    group_matcher = models.HorNet.group_matcher  # for layer decay

    def init_weights(self) -> None:
        """Load the start weights, if any; the constructor has initialized everything."""
        if not self.pretrained:
            return
        path = fetched(self.pretrained)
        found = weights_in(read_checkpoint(path), path)
        # left out: neck and heads of a detector, last norm and head of a classifier
        backbone = {k: v for k, v in found.items() if k.startswith("backbone.")} or found
        weights = models.checkpoint_filter_fn(backbone, self)
        weights = {k: v for k, v in weights.items() if not re.match(r"(norm|head)\.", k)}
        norms = frozenset(name for name in self.state_dict() if re.match(r"norm\d\.", name))
        load_exactly(self, weights, path, may_lack=norms)
        print_log(f"start weights of the backbone from {path}", "current")

    def train(self, mode: bool = True) -> "HorNet":
        """Set the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for index in range(self.frozen_stages + 1):
            self.downsample_layers[index].eval().requires_grad_(False)
            self.stages[index].eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(self.downsample_layers[index](x))
            if index in self.out_indices:
                x_normed = self.get_submodule(f"norm{index}")(x)
                maps.append(x_normed.contiguous())  # mmcv's RoIAlign misreads channels_last
        return tuple(maps)
