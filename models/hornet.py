"""HorNet: classifier and feature pyramid (Rao et al., NeurIPS 2022, arXiv 2207.14284).

Shapes: images (B, in_chans, H, W); the output of stage i is (B, base_dim * 2**i, H / 2**(i + 2),
W / 2**(i + 2)), rounded down. All tensors are logically channels first. In memory they become
channels last with the first norm, which runs over the last axis, and stay so; every pointwise
layer is a 1x1 convolution, the fastest form of a matrix product in this layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, SelectAdaptivePool2d
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from .block import NORM_EPS, Block, Stage
from .global_filter import GlobalLocalFilter, set_global_filter_impl
from .gnconv import GnConv
from .layers import DepthwiseConv

STEM_STRIDE = 4
POOLS = ("", "avg", "max", "avgmax", "fast", "fastavg", "fastmax", "fastavgmax")


class HorNet(nn.Module):
    """HorNet, with the interface of a timm model.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 leaves it out.
        global_pool: 'avg', 'max', 'avgmax', or '' for none (the head then gives a map).
        depths: Blocks per stage.
        base_dim: Channels of the first stage; each further stage has twice as many.
        orders: Order of the GnConv per stage.
        kernel_size: Kernel of the depthwise convolutions.
        s: Scale of the depthwise output inside each GnConv.
        global_filters: Per stage (h, w) of its global filters, or None for convolutions.
        global_filter_impl: 'fft', or 'matmul' for the path without complex numbers.
        mlp_ratio: Hidden width of the MLPs as a multiple of the stage's width.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        layer_scale_init_value: Initial layer scale; None or 0 leaves it out.
        head_init_scale: Factor on the head's initial weights.

    Raises:
        ValueError: lists of different lengths, an unknown pooling, or what GnConv refuses.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 3, 18, 2),
        base_dim: int = 64,
        orders: Sequence[int] = (2, 3, 4, 5),
        kernel_size: int = 7,
        s: float = 1 / 3,
        global_filters: Sequence[tuple[int, int] | None] | None = None,
        global_filter_impl: str = "fft",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        global_filters = [None] * len(depths) if global_filters is None else list(global_filters)
        if not len(depths) == len(orders) == len(global_filters):
            raise ValueError(
                "depths, orders and global_filters need one entry per stage, "
                f"not {len(depths)}, {len(orders)} and {len(global_filters)}"
            )
        dims = [base_dim * 2**i for i in range(len(depths))]
        self.in_chans = in_chans
        self.depths = tuple(depths)
        self.drop_rate = drop_rate
        self.head_init_scale = head_init_scale
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": STEM_STRIDE * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]

        self.downsample_layers = _downsample_layers(in_chans, dims, **factory)
        self.stages = nn.ModuleList()
        options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "scale": s,
            "global_filter_impl": global_filter_impl,
            "mlp_ratio": mlp_ratio,
            "layer_scale_init_value": layer_scale_init_value,
            **factory,
        }
        for i, rates in enumerate(_drop_path_rates(drop_path_rate, depths)):
            options.update(order=orders[i], global_filter=global_filters[i])
            blocks = (Block(dims[i], drop_path=rate, **options) for rate in rates)
            self.stages.append(Stage(*blocks))
        self.norm: nn.Module = LayerNorm2d(self.num_features, eps=NORM_EPS, **factory)
        self._set_head(num_classes, global_pool, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every parameter, as the released models were.

        | parameter                               | value                                   |
        | --------------------------------------- | --------------------------------------- |
        | weight of convolutions, linear layers   | truncated normal, std 0.02              |
        | their biases                            | 0                                       |
        | complex_weight of global filters        | truncated normal, std 0.02              |
        | weight, bias of norms                   | 1, 0                                    |
        | gamma1, gamma2 (layer scale)            | layer_scale_init_value (1e-6)           |
        | head                                    | as linear layers, times head_init_scale |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, GlobalLocalFilter):
                module.reset_filter()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Block):
                module.reset_layer_scale()
        self._scale_head()

    @torch.no_grad()
    def _scale_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            self.head.weight.mul_(self.head_init_scale)
            self.head.bias.mul_(self.head_init_scale)

    def _set_head(self, num_classes: int, global_pool: str, device=None, dtype=None) -> None:
        """Pooling and head; what is before them stays."""
        if global_pool not in POOLS:
            raise ValueError(f"unknown global_pool {global_pool!r}: use avg, max, avgmax or ''")
        self.num_classes = num_classes
        self.pooled = bool(global_pool)
        # flattened after the norm, which wants the channels of a map
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=False)
        self.head = (
            nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)
            if num_classes > 0
            else nn.Identity()
        )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups, first to last, each a pattern of names.

        Fine (layer decay): the stem; stages 0, 1 and 3, and every two blocks of stage 2, each
        with the downsampling before it; norm and head match nothing and so come last.
        Coarse: the stem, the stages.
        """
        groups = {"stem": r"^downsample_layers\.0\."}
        for i, depth in enumerate(self.depths):
            if coarse or i != 2:
                groups[f"stage{i}"] = rf"^(?:downsample_layers|stages)\.{i}\."
                continue
            for j in range(0, depth, 2):
                before = rf"|downsample_layers\.{i}\." if j == 0 else ""
                groups[f"stage{i}_{j}"] = rf"^(?:stages\.{i}\.(?:{j}|{j + 1})\.{before})"
        return groups

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names kept from weight decay beside the 1-D parameters: none."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        _set_grad_checkpointing(self, enable)

    @torch.jit.ignore
    def set_lean_memory(self, enable: bool = True) -> None:
        """Recompute what is cheap of each block in the backward pass: about half the memory.

        Not in a compiled model, whose compiler chooses what to recompute.
        """
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.lean_memory = enable

    @torch.jit.ignore
    def set_triton(self, enable: bool = True) -> None:
        """Compute by this project's GPU kernels: depthwise convolutions and global filters, and in
        inference norms with proj_in and short recursions with proj_out.

        Where Triton, the device or the shape does not allow it, by PyTorch's, with a warning.
        """
        for module in self.modules():
            if isinstance(module, DepthwiseConv | GnConv):
                module.use_triton = enable
            elif isinstance(module, GlobalLocalFilter) and enable != (module.impl == "triton"):
                module.set_impl("triton" if enable else "fft")

    @torch.jit.ignore
    def set_global_filter_impl(self, impl: str) -> None:
        """Compute the global filters by 'fft', 'matmul' or 'triton'."""
        set_global_filter_impl(self, impl)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head: nn.Linear, or nn.Identity without classes."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a freshly initialised one; global_pool None keeps the pooling.

        Raises:
            ValueError: as the constructor.
        """
        like = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool, device=like.device, dtype=like.dtype)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self._scale_head()
        self.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, with strides 4, 8, 16, 32.

        Args:
            x: Images.
            indices: Stages to return: the last n, a list, or None for all.
            norm: Apply the final norm to the output of the last stage (over its channels).
            stop_early: Leave out the stages after the last one asked for.
            output_fmt: 'NCHW' only.
            intermediates_only: Return only the list.

        Returns:
            The list, or (the output of forward_features, the list).
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        if not torch.jit.is_scripting():
            _require_size(x, STEM_STRIDE * 2 ** (len(self.stages) - 1))
        taken, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates: list[Tensor] = []
        # noqa below: TorchScript knows no strict
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):  # noqa: B905
            if i <= max_index or not stop_early:
                x = stage(downsample(x))
                if i in taken:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last one asked for, and with them the norm and the head.

        Args:
            indices: Stages to keep: the last n, or a list.
            prune_norm: Drop the final norm in any case.
            prune_head: Drop the head in any case.

        Returns:
            The stages asked for, counted from the first.
        """
        taken, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.downsample_layers = self.downsample_layers[: max_index + 1]
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        self.train(self.training)
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> output of the last stage, before pooling and norm."""
        if not torch.jit.is_scripting():
            _require_size(x, STEM_STRIDE * 2 ** (len(self.stages) - 1))
        # noqa below: TorchScript knows no strict
        for downsample, stage in zip(self.downsample_layers, self.stages):  # noqa: B905
            x = stage(downsample(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of the last stage -> pooled, normed, then logits unless pre_logits.

        Without pooling the result is a map, of features or of logits.
        """
        x = self.norm(self.global_pool(x))
        if self.pooled:
            x = x.flatten(1)
        x = self.head_drop(x)
        if pre_logits:
            return x
        if self.pooled:
            return self.head(x)
        return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class HorNetFeatures(FeatureGetterNet):
    """HorNet as a feature pyramid, what timm makes of it with features_only=True."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As HorNet.set_grad_checkpointing."""
        _set_grad_checkpointing(self, enable)


def _set_grad_checkpointing(module: nn.Module, enable: bool) -> None:
    for stage in module.modules():
        if isinstance(stage, Stage):
            stage.grad_checkpointing = enable


def _downsample_layers(in_chans: int, dims: list[int], device=None, dtype=None) -> nn.ModuleList:
    """The stem (convolution, norm), then a norm and a strided convolution before each stage."""
    factory = {"device": device, "dtype": dtype}
    stem = nn.Sequential(
        nn.Conv2d(in_chans, dims[0], STEM_STRIDE, stride=STEM_STRIDE, **factory),
        LayerNorm2d(dims[0], eps=NORM_EPS, **factory),
    )
    layers = nn.ModuleList([stem])
    for narrow, wide in zip(dims[:-1], dims[1:], strict=True):
        norm = LayerNorm2d(narrow, eps=NORM_EPS, **factory)
        layers.append(nn.Sequential(norm, nn.Conv2d(narrow, wide, 2, stride=2, **factory)))
    return layers


def _drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates per stage and block, growing linearly over all blocks from 0 to `last`."""
    steps = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [
        [last * (start + j) / steps for j in range(depth)]
        for start, depth in zip(starts, depths, strict=True)
    ]


def _require_size(x: Tensor, smallest: int) -> None:
    """Raise a ValueError if the last stage's map would be empty.

    Not while a graph is recorded: there the size may be symbolic, and a check would fix it.
    """
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    height, width = x.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height} x {width} are too small: this model takes {smallest} x {smallest}"
            " or larger"
        )
