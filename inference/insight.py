"""What a HorNet has learnt, tensors in, tensors out; pictures.py draws it.

Shapes: images (B, 3, H, W), normalised.
"""

import torch
import torch.nn.functional as F
from captum.attr import LayerActivation, LayerGradCam
from torch import Tensor, nn

from models import GlobalLocalFilter, GnConv
from models.spectral import spectral_filter

SMALLEST_MAP = 4  # smaller maps have no useful resolution: an earlier stage is used instead


def _deepest(maps: list[Tensor]) -> int:
    """Return the index of the last map (B, C, h, w) that is not too small."""
    return max((k for k, x in enumerate(maps) if min(x.shape[2:]) >= SMALLEST_MAP), default=0)


def effective_receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """Return how much each pixel changes the centre of the deepest map: (H, W), at most 1.

    The mean magnitude of the gradient over images, summed over colours (Luo et al., 2016,
    arXiv 1701.04128; here of the sum of the positive channels); zero if no pixel changes it.
    """
    field = torch.zeros(images.shape[2:])
    for image in images.split(1):  # the graph of many images would fill the memory
        image = image.clone().requires_grad_()
        _, maps = model.forward_intermediates(image)  # type: ignore[operator]
        features = maps[_deepest(maps)]
        middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.relu().sum(), image)
        field += gradient[0].abs().sum(0)
    return field / field.max().clamp(min=1e-30)


def width_of_field(field: Tensor, share: float = 0.5) -> int:
    """Return the side of the smallest square around the centre of mass that holds a share."""
    total, most = field.sum(), max(field.shape)
    if total == 0:
        return most
    centre = [
        round(float((field.sum(1 - axis) * torch.arange(field.shape[axis])).sum() / total))
        for axis in (0, 1)
    ]
    for half in range(most // 2):
        rows, columns = (slice(max(0, k - half), k + half + 1) for k in centre)
        if field[rows, columns].sum() >= share * total:
            return 2 * half + 1
    return most


@torch.no_grad()
def global_filters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each global filter in frequency (magnitudes) and in space, both (C, H, W), by name.

    H x W is the size of the map that the filter is made for, and the filter in space is its impulse
    response. Zero frequency and zero shift are in the middle.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, GlobalLocalFilter):
            weight = module.complex_weight.float()
            channels, height, columns = weight.shape[:3]
            # two widths give this number of columns; prefer a square map
            width = height if height // 2 + 1 == columns else max(1, 2 * (columns - 1))
            impulse = torch.zeros(1, channels, height, width)
            impulse[..., 0, 0] = 1
            space = spectral_filter(impulse, weight)[0]
            frequency = torch.fft.fft2(space).abs()
            shifted = [torch.fft.fftshift(x, dim=(1, 2)) for x in (frequency, space)]
            found[name] = shifted[0], shifted[1]
    return found


def gate_maps(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """Return the gates f_k(q_k) / alpha of the last gnConv of each stage of a plain network.

    Each is the mean magnitude over the channels, (B, h, w), for k = 0 ... n - 1.
    """
    last: dict[str, tuple[str, GnConv]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GnConv):
            last[name.rsplit(".", 2)[0]] = name, module  # stages.0.1.gnconv is in stages.0
    convolutions: list[nn.Module] = [layer.dwconv for _, layer in last.values()]
    outputs = LayerActivation(model, convolutions).attribute(images)
    return {
        name: [layer.scale * q.abs().mean(1) for q in q_all.split(layer.dims, dim=1)]
        for (name, layer), q_all in zip(last.values(), outputs, strict=True)
    }


def grad_cam(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return where the network sees a class, by default the predicted one: (B, H, W) in [0, 1].

    Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391, equations 1 and 2) of the deepest map; zero
    if nothing is evidence for the class.
    """
    with torch.no_grad():
        last, maps = model.forward_intermediates(images)  # type: ignore[operator]
        if labels is None:
            labels = model.forward_head(last).argmax(1)  # type: ignore[operator]
    stage = model.stages[_deepest(maps)]  # type: ignore[index]
    images = images.clone().requires_grad_()  # frozen networks need it
    cam = LayerGradCam(model, stage).attribute(images, labels, relu_attributions=True)
    cam = F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).detach()
