"""HorNet with eager PyTorch's own layers: the default peer of the benchmarks, an oracle of tests.

Channels first throughout, a norm written by hand, complex numbers, nothing folded or fused.
State-dict keys are those of the released checkpoints.

Shapes: (B, C, H, W) unless a name says otherwise.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.LayerNorm):
    """Layer norm over the channels, here the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GlobalLocalFilter(nn.Module):
    """A 3x3 convolution on one half of the channels, a filter of frequencies on the other."""

    def __init__(self, channels: int, h: int, w: int) -> None:
        super().__init__()
        half = channels // 2
        self.dw = nn.Conv2d(half, half, 3, padding=1, bias=False, groups=half)
        self.complex_weight = nn.Parameter(0.02 * torch.randn(half, h, w, 2))
        self.pre_norm = Norm(channels, eps=1e-6)
        self.post_norm = Norm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        local, spread = self.pre_norm(x).chunk(2, dim=1)
        local = self.dw(local)
        spectrum = torch.fft.rfft2(spread.float(), norm="ortho")
        planes = self.complex_weight.permute(3, 0, 1, 2)
        if planes.shape[2:] != spectrum.shape[2:]:
            planes = F.interpolate(planes, spectrum.shape[2:], mode="bilinear", align_corners=True)
        weight = planes.permute(1, 2, 3, 0)
        spectrum = spectrum * torch.view_as_complex(weight.float().contiguous())
        spread = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
        mixed = torch.stack((local, spread), dim=2).reshape(batch, channels, height, width)
        return self.post_norm(mixed)


class GnConv(nn.Module):
    """Equations 3.3 to 3.5 of the paper, one operation at a time."""

    def __init__(self, dim: int, order: int, filter_size) -> None:
        super().__init__()
        self.dims = [dim // 2**k for k in reversed(range(order))]
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.dwconv = (
            GlobalLocalFilter(total, *filter_size)
            if filter_size
            else nn.Conv2d(total, total, 7, padding=3, groups=total)
        )
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in pairwise(self.dims))

    def forward(self, x: Tensor) -> Tensor:
        p, q_all = torch.split(self.proj_in(x), [self.dims[0], sum(self.dims)], dim=1)
        q = torch.split(self.dwconv(q_all) * (1 / 3), self.dims, dim=1)
        p = p * q[0]
        for pw, q_k in zip(self.pws, q[1:], strict=True):
            p = pw(p) * q_k
        return self.proj_out(p)


class Block(nn.Module):
    def __init__(self, dim: int, order: int, filter_size) -> None:
        super().__init__()
        self.norm1 = Norm(dim, eps=1e-6)
        self.gnconv = GnConv(dim, order, filter_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma1 = nn.Parameter(1e-6 * torch.ones(dim))
        self.gamma2 = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1.view(-1, 1, 1) * self.gnconv(self.norm1(x))
        y_bhwc = self.norm2(x.permute(0, 2, 3, 1))
        y_bhwc = self.gamma2 * self.pwconv2(self.act(self.pwconv1(y_bhwc)))
        return x + y_bhwc.permute(0, 3, 1, 2)


class PlainHorNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, base_dim: int, filters, num_classes=1000, depths=(2, 3, 18, 2)) -> None:
        super().__init__()
        dims = [base_dim * 2**i for i in range(4)]
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), Norm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in pairwise(dims):
            convolution = nn.Conv2d(narrow, wide, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(Norm(narrow, eps=1e-6), convolution))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dims[i], i + 2, filters[i]) for _ in range(depths[i])))
            for i in range(4)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((-2, -1))))


_FILTERS = {
    "7x7": (None,) * 4,
    "gf": (None, None, (14, 8), (7, 4)),
    "gf_img384": (None, None, (24, 13), (12, 7)),
}
MODELS = {
    f"hornet_{size}_{kind}": partial(PlainHorNet, base_dim, filters)
    for size, base_dim in {"tiny": 64, "small": 96, "base": 128, "large": 192}.items()
    for kind, filters in _FILTERS.items()
    if kind != "gf_img384" or size in ("base", "large")
}
