"""HorNet: classifier and feature pyramid (Rao et al., NeurIPS 2022, arXiv 2207.14284).

Shapes: images (B, in_chans, H, W); the output of stage i is (B, base_dim * 2**i, H / 2**(i + 2),
W / 2**(i + 2)), rounded down. `models.accelerate` computes the same faster.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d
from timm.models import checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from .gnconv import GlobalLocalFilter, GnConv
from .layers import ChannelLinear, defined_by, fold_norm, fold_scale

NORM_EPS = 1e-6
STEM_STRIDE = 4
POOLS = ("", "avg", "max", "avgmax", "fast", "fastavg", "fastmax", "fastavgmax")


class Block(nn.Module):
    """x + gamma1 * GnConv(norm(x)), then x + gamma2 * MLP(norm(x)), on (B, dim, H, W) (figure 2).

    Args:
        order, scale: n and s of the GnConv.
        mlp_ratio: Hidden width of the MLP as a multiple of dim.
        drop_path: Probability of dropping each of the two branches, per sample.
        layer_scale_init_value: Initial gamma1 and gamma2; None or 0 leaves them out.
        kernel_size, global_filter, global_filter_impl: Those of GnConv, which may raise ValueError.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(
        self,
        dim: int,
        order: int,
        kernel_size: int = 7,
        scale: float = 1 / 3,
        global_filter: tuple[int, int] | None = None,
        global_filter_impl: str = "fft",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = int(mlp_ratio * dim)
        self.layer_scale_init_value = layer_scale_init_value or 0.0
        for name in ("gamma1", "gamma2"):
            gamma = nn.Parameter(torch.empty(dim, **factory)) if layer_scale_init_value else None
            self.register_parameter(name, gamma)
        self.reset_parameters()
        self.norm1 = LayerNorm2d(dim, eps=NORM_EPS, **factory)
        self.gnconv = GnConv(dim, dim, order, kernel_size, scale, global_filter,
                             global_filter_impl, **factory)  # fmt: skip
        self.norm2 = LayerNorm2d(dim, eps=NORM_EPS, **factory)
        self.pwconv1 = ChannelLinear(dim, hidden, **factory)
        self.act = nn.GELU()
        self.pwconv2 = ChannelLinear(hidden, dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(self.gnconv(self.norm1(x)), self.gamma1))
        y = self.pwconv2(self.act(self.pwconv1(self.norm2(x))))
        return x + self.drop_path(_scaled(y, self.gamma2))

    def reset_parameters(self) -> None:
        """Set gamma1 and gamma2 to layer_scale_init_value."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None:
                nn.init.constant_(gamma, self.layer_scale_init_value)

    def reparameterize(self) -> None:
        """Fold s, gamma1, gamma2 and the norms' weights into the layers beside them, for inference.

        timm.utils.reparameterize_model calls it. Layers of other types than these stay out of it.
        """
        if defined_by(self.gnconv) is GnConv:
            mixer: Any = self.gnconv.dwconv
            mixer = mixer.post_norm if defined_by(mixer) is GlobalLocalFilter else mixer
            if fold_scale(torch.tensor(self.gnconv.scale), mixer):
                self.gnconv.scale = 1.0
            fold_norm(self.norm1, self.gnconv.proj_in)
            if fold_scale(self.gamma1, self.gnconv.proj_out):
                self.gamma1 = None
        fold_norm(self.norm2, self.pwconv1)
        if fold_scale(self.gamma2, self.pwconv2):
            self.gamma2 = None


class Stage(nn.Sequential):
    """Blocks in a row; with grad_checkpointing each is recomputed in the backward pass."""

    __constants__ = ["grad_checkpointing"]  # TorchScript compiles only the branch taken

    def __init__(self, *blocks: Block) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint_seq(self, x)
        for block in self:
            x = block(x)
        return x


class HorNet(nn.Module):
    """HorNet, with the interface of a timm model.

    Args:
        num_classes: Classes of the head; 0 leaves it out.
        global_pool: 'avg', 'max', 'avgmax', or '' for none (the head then gives a map).
        depths: Blocks per stage.
        base_dim: Channels of the first stage; each further stage has twice as many.
        orders: Order of the GnConv per stage.
        s: Scale of the depthwise output inside each GnConv.
        global_filters: Per stage (h, w) of its global filters, or None for convolutions.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        head_init_scale: Factor on the head's initial weights.
        kernel_size, global_filter_impl, mlp_ratio, layer_scale_init_value: Those of the blocks.

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
        filters = [None] * len(depths) if global_filters is None else global_filters
        if not len(depths) == len(orders) == len(filters):
            raise ValueError(
                "depths, orders and global_filters need one entry per stage, "
                f"not {len(depths)}, {len(orders)} and {len(filters)}"
            )
        dims = [base_dim * 2**i for i in range(len(depths))]
        self.in_chans = in_chans
        self.depths = tuple(depths)
        self.head_init_scale = head_init_scale
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": STEM_STRIDE * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]

        stem = nn.Conv2d(in_chans, base_dim, STEM_STRIDE, stride=STEM_STRIDE, **factory)
        stem_norm = LayerNorm2d(base_dim, eps=NORM_EPS, **factory)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, stem_norm)])
        for narrow, wide in pairwise(dims):
            norm = LayerNorm2d(narrow, eps=NORM_EPS, **factory)
            downsample = nn.Conv2d(narrow, wide, 2, stride=2, **factory)
            self.downsample_layers.append(nn.Sequential(norm, downsample))
        self.stages = nn.ModuleList()
        # in float32, as in the release
        drop_rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(depths)
        for dim, order, filter_size, rates in zip(dims, orders, filters, drop_rates):
            self.stages.append(Stage(*[
                Block(dim, order, kernel_size, s, filter_size, global_filter_impl, mlp_ratio, rate,
                      layer_scale_init_value, **factory)
                for rate in rates.tolist()
            ]))  # fmt: skip
        self.norm: nn.Module = LayerNorm2d(self.num_features, eps=NORM_EPS, **factory)
        self._set_head(num_classes, global_pool, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

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
        self._init(self)

    def _set_head(self, num_classes: int, global_pool: str, **factory: Any) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"unknown global_pool {global_pool!r}: use avg, max, avgmax or ''")
        self.num_classes = num_classes
        self.pooled = bool(global_pool)
        # flattened after the norm, which wants the channels of a map
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=False)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **factory)

    @torch.no_grad()
    def _init(self, part: nn.Module) -> None:
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, GlobalLocalFilter | nn.LayerNorm | Block):
                module.reset_parameters()
        for parameter in self.head.parameters():
            parameter.mul_(self.head_init_scale)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups, first to last, each a pattern of names.

        Fine (layer decay): group 0 is the stem, 1 stage 0, 2 stage 1, from 3 on every two blocks of
        stage 2, then stage 3. downsample_layers.i is in the first group of stage i, so 2 is always
        in group 3. Norm and head match nothing and so come last. Coarse: the stem, the stages.
        """
        groups = {"stem": r"^downsample_layers\.0\."}
        for i, depth in enumerate(self.depths):
            if coarse or i != 2:
                groups[f"stage{i}"] = rf"^(?:downsample_layers|stages)\.{i}\."
                continue
            for j in range(0, depth, 2):
                or_downsampling = rf"|downsample_layers\.{i}\." if j == 0 else ""
                groups[f"stage{i}_{j}"] = rf"^(?:stages\.{i}\.(?:{j}|{j + 1})\.{or_downsampling})"
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head: nn.Linear, or nn.Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a freshly initialised one; global_pool None keeps the pooling."""
        like = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool, device=like.device, dtype=like.dtype)
        self._init(self.head)
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
        """Return (the output of forward_features, outputs of stages), or the latter only.

        `indices` are the stages to return: the last n, a list, or None for all. `norm` applies the
        final norm to the output of the last stage; `stop_early` leaves out the stages after the
        last one asked for; `output_fmt` is 'NCHW'.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        _require_size(x, stages=len(self.stages))
        taken, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates: list[Tensor] = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            if i <= max_index or not stop_early:
                x = stage(downsample(x))
                if i in taken:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices` (the last n, or a list); returns their list.

        With stages go the norm and the head; prune_norm and prune_head drop these in any case.
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
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> output of the last stage, before pooling and norm."""
        _require_size(x, stages=len(self.stages))
        for downsample, stage in zip(self.downsample_layers, self.stages):
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

    set_grad_checkpointing = HorNet.set_grad_checkpointing


@torch.fx.wrap  # one operation of a symbolic trace, which knows no sizes
def _require_size(x: Tensor, stages: int) -> None:
    """Raise a ValueError if the last stage's map would be empty."""
    height, width = x.shape[2], x.shape[3]
    smallest = 4 << (stages - 1)  # the stem's stride, then 2 per stage
    if not torch.jit.is_tracing() and (height < smallest or width < smallest):
        raise ValueError(
            f"images of {height} x {width} are too small: this model takes {smallest} x {smallest}"
            " or larger"
        )


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """x (B, C, H, W) times the layer scale gamma (C), if there is one."""
    return x if gamma is None else x * gamma[:, None, None]
