"""HorNet as a backbone of mmdet and mmseg: four maps at strides 4, 8, 16 and 32.

Parameters are named as in the released detectors and segmentors: those of the classifier without
its norm and head, and a norm for each map that is given out.
"""

import re
from collections.abc import Sequence
from typing import Any

import timm
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import models
from checkpoints.fitting import load_exactly
from checkpoints.reading import read_checkpoint, weights_in
from dense.loading import fetched
from models.hornet import NORM_EPS
from runtime.errors import UserError


@MODELS.register_module()
class HorNet(BaseModule):
    """The feature pyramid of a HorNet.

    Input: images (B, 3, H, W). Output: for each of out_indices a contiguous map (B, C * 2**i,
    H / 2**(i + 2), W / 2**(i + 2)), rounded down and normed over its channels.

    Args:
        arch: Variant, such as 'tiny_7x7' or 'large_gf' (models/variants.py, without 'hornet_').
        out_indices: Stages whose maps are given out.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        layer_scale_init_value: Initial layer scale; it is 1.0 in the released configs.
        global_filters: Per stage (h, w) of its global filters, or None; those of the variant if
            not given. They are resized to the maps at hand.
        with_cp: Recompute each block in the backward pass instead of storing its activations.
        frozen_stages: Last stage that is kept as it starts; -1 for none.
        pretrained: Start weights of a classifier: a path, an address, or a published name. Given by
            init_cfg=dict(type='Pretrained', checkpoint=...) too.
        kwargs: Further arguments of the model, such as base_dim and depths.

    Raises:
        UserError: the variant does not exist, or (init_weights) the start weights do not fit.
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
        self.train()  # freezes, before anyone counts on gradients

    # layer decay takes its groups from the classifier
    group_matcher = models.HorNet.group_matcher

    def init_weights(self) -> None:
        """Loads the start weights, if there are any; the rest is initialised already."""
        if not self.pretrained:
            return
        path = fetched(self.pretrained)
        found = weights_in(read_checkpoint(path), path)
        # a classifier's last norm and head have no place here, nor a detector's neck and heads
        backbone = {k: v for k, v in found.items() if k.startswith("backbone.")} or found
        weights = {
            name: value
            for name, value in models.checkpoint_filter_fn(backbone, self).items()
            if not re.match(r"(norm|head)\.", name)
        }
        norms = frozenset(name for name in self.state_dict() if re.match(r"norm\d\.", name))
        load_exactly(self, weights, path, may_lack=norms)
        print_log(f"start weights of the backbone from {path}", "current")

    def train(self, mode: bool = True) -> "HorNet":
        """As nn.Module.train; frozen stages stay in evaluation mode."""
        super().train(mode)
        for index in range(self.frozen_stages + 1):
            for part in (self.downsample_layers[index], self.stages[index]):
                part.eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for index, (downsample, stage) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = stage(downsample(x))
            if index in self.out_indices:
                norm: nn.Module = getattr(self, f"norm{index}")
                # mmcv's RoIAlign misreads maps that are channels last in memory
                maps.append(norm(x).contiguous())
        return tuple(maps)
