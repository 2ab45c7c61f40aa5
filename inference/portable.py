"""The same network in operators that other runtimes have; what depends on weights is computed once.

Each replacement is needed by a runtime that is named beside it; docs/deploy.md has the list.
"""

import torch
from torch import Tensor, nn

from models import GlobalLocalFilter, set_global_filter_impl
from models.layers import ChannelLinear
from models.spectral import dft_matrices, filter_by_matrices, resize_filter

MATRICES = ("along_height", "height_back", "along_width", "width_back")
"""Names of the constants of `dft_matrices`."""


class _MeanPool(nn.Module):
    """Average pooling (B, C, H, W) -> (B, C, 1, 1).

    Exporters turn adaptive pooling into an index operator, which ncnn and OpenCV do not have.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class _FixedFilter(nn.Module):
    """A GlobalLocalFilter for maps (B, C, H, W) of one size: its resized filter and its discrete
    Fourier transforms are constants.

    Core ML does not take the integers that these are computed from.
    """

    k_real: Tensor
    k_imag: Tensor

    def __init__(self, layer: GlobalLocalFilter, height: int, width: int) -> None:
        super().__init__()
        self.dw, self.pre_norm, self.post_norm = layer.dw, layer.pre_norm, layer.post_norm
        self.sizes = [height, width // 2 + 1, layer.dw.in_channels]
        weight = layer.complex_weight.detach().float()
        filters = resize_filter(weight, height, width // 2 + 1).permute(3, 1, 2, 0)
        matrices = dft_matrices(height, width, weight)
        for name, constant in zip(("k_real", "k_imag"), filters, strict=True):
            self.register_buffer(name, constant.contiguous())
        for name, constant in zip(MATRICES, matrices, strict=True):
            self.register_buffer(name, constant.contiguous())
        self.map_size = (height, width)
        self.converts = layer.complex_weight.dtype != torch.float32

    def forward(self, x: Tensor) -> Tensor:
        local, spectral = self.pre_norm(x).split(self.sizes[2], dim=1)
        if self.map_size == (1, 1):
            # of one pixel OpenCV 4's depthwise convolution is wrong
            centre = self.dw.kernel_size[0] // 2
            local = local * self.dw.weight[:, :, centre, centre, None]
        else:
            local = self.dw(local)
        if self.converts:
            spectral = spectral.float()
        if self.map_size == (1, 1):
            # its transform is the pixel itself; ncnn fails on products of so small a map
            spectral = spectral * self.k_real.permute(2, 0, 1)
        else:
            matrices = [getattr(self, name) for name in MATRICES]
            spectral = filter_by_matrices(spectral, self.sizes, self.k_real, self.k_imag, *matrices)
        if self.converts:
            spectral = spectral.to(x.dtype)
        # with sizes as numbers, since sizes of tensors are operators of a graph
        height, width = self.map_size
        mixed = torch.stack((local, spectral), dim=2)
        return self.post_norm(mixed.reshape(-1, 2 * self.sizes[2], height, width))


def portable(model: nn.Module, shape: tuple[int, ...] | None) -> nn.Module:
    """Replace layers of a model, in place, and return it; subclasses of ours stay.

    Args:
        model: Plain (`models.plain`), in the dtype of the computation.
        shape: Of the images; None if height and width vary, which leaves global filters as they
            are, but without complex numbers.
    """
    sizes = {} if shape is None else _map_sizes(model, shape)
    set_global_filter_impl(model, "matmul")
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is ChannelLinear:
                setattr(parent, name, _convolution(layer))
            elif type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)):
                setattr(parent, name, _MeanPool())
            elif type(layer) is GlobalLocalFilter and layer in sizes:
                setattr(parent, name, _FixedFilter(layer, *sizes[layer]))
    return model


def _convolution(layer: ChannelLinear) -> nn.Conv2d:
    """Return the same layer as a convolution, which is what int8 quantises."""
    has_bias = layer.bias is not None
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=has_bias, device="meta")
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None])
    conv.bias = layer.bias
    return conv


@torch.no_grad()
def _map_sizes(model: nn.Module, shape: tuple[int, ...]) -> dict[nn.Module, tuple[int, int]]:
    """Return height and width of the map that each global filter gets."""
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        height, width = inputs[0].shape[2:]
        sizes[layer] = (height, width)

    filters = [layer for layer in model.modules() if isinstance(layer, GlobalLocalFilter)]
    hooks = [layer.register_forward_pre_hook(record) for layer in filters]
    if filters:
        model(next(model.parameters()).new_zeros(shape))
    for hook in hooks:
        hook.remove()
    return sizes
