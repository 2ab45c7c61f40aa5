"""The same network in operators that other runtimes take, with constants instead of computations.

Each replacement is needed by a runtime that is named beside it; docs/deploy.md has the list.
"""

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from models import GlobalLocalFilter, set_global_filter_impl
from models.layers import ChannelLinear
from models.spectral import dft_matrices, filter_by_matrices, resize_filter


class _MeanPool(nn.Module):
    """Global average pooling (B, C, H, W) -> (B, C, 1, 1).

    Exporters turn adaptive pooling into an index operator, which ncnn and OpenCV do not have.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class _FixedFilter(nn.Module):
    """A GlobalLocalFilter for maps of one size, whose resized filter and DFTs are constants.

    Core ML does not take the integers that these are computed from.
    """

    def __init__(self, layer: GlobalLocalFilter, height: int, width: int) -> None:
        super().__init__()
        self.dw, self.pre_norm, self.post_norm = layer.dw, layer.pre_norm, layer.post_norm
        self.height, self.width, self.channels = height, width, layer.dw.in_channels
        self.sizes = [height, width // 2 + 1, self.channels]
        weight = layer.complex_weight.detach().float()
        k_real, k_imag = resize_filter(weight, height, width // 2 + 1).permute(3, 1, 2, 0)
        constants = (k_real, k_imag, *dft_matrices(height, width, weight))
        self.names = [f"constant{i}" for i in range(len(constants))]
        for name, constant in zip(self.names, constants, strict=True):
            self.register_buffer(name, constant.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        local, spectral = self.pre_norm(x).split(self.channels, dim=1)
        local = self.dw(local)
        constants = [getattr(self, name) for name in self.names]
        half_precision = x.dtype != torch.float32
        spectral = spectral.float() if half_precision else spectral
        spectral = filter_by_matrices(spectral, self.sizes, *constants)
        spectral = spectral.to(x.dtype) if half_precision else spectral
        mixed = torch.stack((local, spectral), dim=2)
        return self.post_norm(mixed.reshape(-1, 2 * self.channels, self.height, self.width))


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
            elif isinstance(layer, SelectAdaptivePool2d) and layer.pool_type == "avg":
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
