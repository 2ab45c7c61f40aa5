"""What a HorNet has learnt, in numbers: tensors in, tensors out; tools.visualize draws them.

Shapes: images (B, 3, H, W), normalised as the network takes them.
"""

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from models import GlobalLocalFilter, GnConv
from models.spectral import spectral_filter

SMALLEST_MAP = 4
"""Stages of smaller maps tell no places apart: for small images an earlier stage is looked at."""


def _deepest(maps: list[Tensor]) -> int:
    """The last of the stages with these maps (B, C, h, w) that tells places apart."""
    return max((k for k, x in enumerate(maps) if min(x.shape[2:]) >= SMALLEST_MAP), default=0)


def effective_receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """How much each pixel moves the middle of the deepest map that tells places apart: (H, W), 1 at
    most; 0 throughout where nothing moves it.

    The mean over images of the gradient's magnitude, summed over colours (Luo et al., 2016,
    arXiv 1701.04128; here of the sum of the positive channels).
    """
    field = torch.zeros(images.shape[2:])
    for image in images.split(1):  # one by one: a graph of many would fill the memory
        image = image.clone().requires_grad_()
        _, maps = model.forward_intermediates(image)  # type: ignore[operator]
        features = maps[_deepest(maps)]
        middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.relu().sum(), image)
        field += gradient[0].abs().sum(0)
    return field / field.max().clamp(min=1e-30)


def width_of_field(field: Tensor, share: float = 0.5) -> int:
    """The side of the smallest square around the centre of mass that holds a share of the field."""
    total = field.sum()
    most = max(field.shape)
    if total == 0:
        return most
    row, column = (
        round(float((field.sum(1 - axis) * torch.arange(field.shape[axis])).sum() / total))
        for axis in (0, 1)
    )
    half = 0
    inside = field[row, column]
    while inside < share * total:
        half += 1
        rows = slice(max(0, row - half), row + half + 1)
        inside = field[rows, max(0, column - half) : column + half + 1].sum()
    return min(2 * half + 1, most)


@torch.no_grad()
def global_filters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Each global filter in frequency (magnitudes) and in space, (C, H, W) both, by name.

    H x W is the map that it is made for: what the layer's global half makes of a single 1 there.
    Both have zero (no frequency, no shift) in the middle.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, GlobalLocalFilter):
            weight = module.complex_weight.float()
            channels, height, columns = weight.shape[:3]
            # of the two widths that have so many columns the one of a square map, if it is one
            width = height if height // 2 + 1 == columns else max(1, 2 * (columns - 1))
            impulse = torch.zeros(1, channels, height, width)
            impulse[..., 0, 0] = 1
            space = spectral_filter(impulse, weight)[0]
            frequency = torch.fft.fft2(space).abs()
            shift = {"dim": (1, 2)}
            found[name] = torch.fft.fftshift(frequency, **shift), torch.fft.fftshift(space, **shift)
    return found


@torch.no_grad()
def gate_maps(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """Of the last gnConv of each stage of a plain network what gates each order, f_k(q_k) / alpha.

    Each is the mean magnitude over the channels, (B, h, w), for k = 0 ... n - 1.
    """
    last: dict[str, tuple[str, GnConv]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GnConv):
            last[name.rsplit(".", 2)[0]] = name, module  # stages.0.1.gnconv: of stages.0
    maps: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in last.values():

        def keep(
            _: nn.Module, __: object, q_all: Tensor, name: str = name, layer: GnConv = layer
        ) -> None:
            maps[name] = [layer.scale * q.abs().mean(1) for q in q_all.split(layer.dims, dim=1)]

        handles.append(layer.dwconv.register_forward_hook(keep))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def grad_cam(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Where the network looks for a class (B, H, W), between 0 and 1; the predicted if not given.

    Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391, equations 1 and 2), by Captum, of the
    deepest map that tells places apart; 0 throughout where nothing speaks for the class.
    """
    with torch.no_grad():
        last, maps = model.forward_intermediates(images)  # type: ignore[operator]
        if labels is None:
            labels = model.forward_head(last).argmax(1)  # type: ignore[operator]
    stage = model.stages[_deepest(maps)]  # type: ignore[index]
    images = images.clone().requires_grad_()  # which frozen networks need
    cam = LayerGradCam(model, stage).attribute(images, labels, relu_attributions=True)
    cam = F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).detach()
