"""GnConv against its definition in the paper, its arguments and its errors."""

import numpy as np
import pytest
import torch
from torch import nn

from models import GlobalLocalFilter, GnConv, accelerate, gnconv


def pointwise(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    weight = conv.weight.detach().numpy()[:, :, 0, 0]
    return np.einsum("oc,bchw->bohw", weight, x) + conv.bias.detach().numpy()[:, None, None]


def depthwise(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """Sum over the kernel's offsets of the shifted, zero-padded input."""
    weight, bias = conv.weight.detach().numpy()[:, 0], conv.bias.detach().numpy()
    height, width = x.shape[2:]
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    y = np.zeros_like(x) + bias[:, None, None]
    for i in range(k):
        for j in range(k):
            y += padded[:, :, i : i + height, j : j + width] * weight[:, i, j, None, None]
    return y


def gnconv_by_definition(
    layer: GnConv, x: np.ndarray, order: int, s: float, channels: int, proj_out: bool = True
) -> np.ndarray:
    """Equations 3.3 to 3.5 with C = channels, one order after the other, in numpy."""
    widths = [channels // 2 ** (order - 1 - k) for k in range(order)]
    projected = pointwise(x, layer.proj_in)
    p, rest = projected[:, : widths[0]], projected[:, widths[0] :]
    assert rest.shape[1] == sum(widths)
    mixed = depthwise(rest, layer.dwconv)
    start = 0
    for k, width in enumerate(widths):
        if k > 0:
            p = pointwise(p, layer.pws[k - 1])
        p = p * (s * mixed[:, start : start + width])
        start += width
    assert p.shape[1] == channels
    return pointwise(p, layer.proj_out) if proj_out else p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "kernel_size", "scale"),
    [(16, None, 7, 1 / 3), (6, 32, 3, 1.0), (24, 16, 1, 0.5)],
)
def test_definition(order, in_channels, out_channels, kernel_size, scale):
    torch.manual_seed(order)
    layer = GnConv(
        in_channels, out_channels, order=order, kernel_size=kernel_size, scale=scale
    ).double()
    x = torch.randn(2, in_channels, 5, 6, dtype=torch.float64)
    channels = out_channels or in_channels
    expected = gnconv_by_definition(layer, x.numpy(), order, scale, channels)
    actual = layer(x).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("dim_ratio", "proj_out"), [(2, True), (3, True), (1, False), (2, False)])
def test_width_of_the_recursion(order, dim_ratio, proj_out):
    torch.manual_seed(order)
    layer = GnConv(6, 8, order, 3, 0.5, dim_ratio=dim_ratio, proj_out=proj_out).double()
    width = 8 * dim_ratio
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    widths = [width // 2 ** (order - 1 - k) for k in range(order)]
    total = sum(widths)
    weights = {"proj_in": (2 * width, 6, 1, 1), "dwconv": (total, 1, 3, 3)}
    if proj_out:
        weights["proj_out"] = (8, width, 1, 1)
    for j in range(order - 1):
        weights[f"pws.{j}"] = (widths[j + 1], widths[j], 1, 1)
    expected = {f"{name}.weight": shape for name, shape in weights.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    assert shapes == expected
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    y = gnconv_by_definition(layer, x.numpy(), order, 0.5, width, proj_out)
    assert y.shape[1] == (8 if proj_out else width)
    np.testing.assert_allclose(layer(x).detach().numpy(), y, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("proj_out", [True, False])
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export"])
def test_width_of_the_recursion_is_recorded(how, proj_out):
    layer = GnConv(4, 8, order=3, global_filter=(6, 4), dim_ratio=2, proj_out=proj_out).eval()
    example, other = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 9, 12)
    with torch.no_grad():
        expected = layer(other)
        if how == "script":
            recorded = torch.jit.script(layer)
        elif how == "trace":
            recorded = torch.jit.trace(layer, example)
        elif how == "fx":
            recorded = torch.fx.symbolic_trace(layer)
        else:
            dims = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
            recorded = torch.export.export(layer, (example,), dynamic_shapes=dims).module()
        torch.testing.assert_close(recorded(other), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 4), (14, 14)])
@pytest.mark.parametrize("global_filter", [None, (14, 8)])
def test_any_size(size, global_filter):
    layer = GnConv(12, 16, order=3, global_filter=global_filter)
    assert layer(torch.randn(2, 12, *size)).shape == (2, 16, *size)


@pytest.mark.parametrize("global_filter", [None, (3, 2)])
def test_gradients(global_filter):
    torch.manual_seed(0)
    layer = GnConv(4, 8, order=3, kernel_size=3, global_filter=global_filter).double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("complex_weight"):
                p.normal_()
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


def test_drop_in_for_a_convolution():
    class Net(nn.Sequential):
        def __init__(self, layer):
            super().__init__(nn.Conv2d(3, 16, 1), layer, nn.ReLU(), nn.Conv2d(16, 2, 1))

    x = torch.randn(2, 3, 9, 11)
    for layer in (nn.Conv2d(16, 16, 7, padding=3), GnConv(16, order=3)):
        assert Net(layer)(x).shape == (2, 2, 9, 11)


def test_the_name_and_signature_of_forks():
    layer = gnconv(32)
    assert isinstance(layer, GnConv)
    assert (layer.order, layer.scale, layer.dwconv.kernel_size) == (5, 1.0, (7, 7))
    layer = gnconv(dim=16, order=3, gflayer=GlobalLocalFilter, h=5, w=4, s=1 / 3)
    assert layer.scale == 1 / 3
    assert layer.dwconv.complex_weight.shape == (14, 5, 4, 2)
    assert layer(torch.randn(1, 16, 5, 6)).shape == (1, 16, 5, 6)
    # positional, as forks call it
    assert gnconv(16, 2, GlobalLocalFilter, 6, 4, 0.5).dwconv.complex_weight.shape[1:3] == (6, 4)
    # the same keys as GnConv, so the same weights load
    same = GnConv(16, order=3, scale=1 / 3, global_filter=(5, 4))
    same.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 5, 6)
    torch.testing.assert_close(layer(x), same(x))


def test_any_mixer():
    layer = GnConv(16, order=3, mixer=lambda channels: nn.Conv2d(channels, channels, 5, padding=2))
    assert layer.dwconv.in_channels == 28
    assert layer(torch.randn(1, 16, 4, 4)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 24, "order": 5}, "multiple of 16 channels, not 24"),
        ({"in_channels": 16, "out_channels": 2, "order": 3}, "multiple of 4 channels, not 2"),
        ({"in_channels": 16, "order": 0}, "whole number from 1 on, not 0"),
        ({"in_channels": 16, "order": 2.5}, "whole number from 1 on, not 2.5"),
        ({"in_channels": 0, "out_channels": 16}, "at least 1 input channel, not 0"),
        ({"in_channels": 16, "dim_ratio": 0}, "dim_ratio of a GnConv is a whole number.*not 0"),
        ({"in_channels": 16, "dim_ratio": 1.5}, "dim_ratio .* whole number from 1 on, not 1.5"),
        ({"in_channels": 6, "order": 4, "dim_ratio": 2}, "multiple of 8 channels, not 12"),
        ({"in_channels": 16, "order": 2, "kernel_size": 4}, "odd, not 4"),
        ({"in_channels": 2, "order": 2, "global_filter": (4, 3)}, "even number of channels, not 3"),
        ({"in_channels": 4, "order": 2, "global_filter": (0, 3)}, "positive height and width"),
        ({"in_channels": 4, "order": 2, "global_filter": 14}, r"\(14, 8\) for 14 x 14, not 14"),
        ({"in_channels": 4, "order": 2, "global_filter": (4, 3, 2)}, r"not \(4, 3, 2\)"),
        (
            {"in_channels": 4, "order": 2, "global_filter": (4, 3), "global_filter_impl": "x"},
            "use fft, matmul",
        ),
        ({"in_channels": 4, "order": 2, "global_filter": (4, 3), "mixer": nn.Identity}, "not both"),
        ({"in_channels": 16, "spatial_dims": 4}, "1, 2 or 3 spatial dimensions, not 4"),
        (
            {"in_channels": 4, "order": 2, "global_filter": (4, 3), "spatial_dims": 3},
            "a global filter has 2 spatial dimensions, not 3",
        ),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        GnConv(**arguments)
    assert "\n" not in str(error.value)


def with_one_slice(layer, axis):
    """Zero the depthwise kernel off the middle of an axis; return the kernel without this axis."""
    weight = layer.dwconv.weight
    middle = weight.shape[2 + axis] // 2
    kept = weight.select(2 + axis, middle).clone()
    weight.zero_()
    weight.select(2 + axis, middle).copy_(kept)
    return kept


@torch.no_grad()
@pytest.mark.parametrize(("spatial_dims", "axis"), [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)])
def test_volumes_and_sequences(spatial_dims, axis):
    """A kernel of one slice acts on each slice as a layer with one dimension less does."""
    torch.manual_seed(axis)
    options = {"out_channels": 16, "order": 3, "kernel_size": 3, "scale": 1 / 3}
    layer = GnConv(8, **options, spatial_dims=spatial_dims, dtype=torch.float64)
    flat = GnConv(8, **options, spatial_dims=spatial_dims - 1, dtype=torch.float64)
    kernel = with_one_slice(layer, axis)
    state = {name: value.reshape(flat.state_dict()[name].shape)
             for name, value in layer.state_dict().items() if name != "dwconv.weight"}  # fmt: skip
    flat.load_state_dict(state | {"dwconv.weight": kernel})
    x = torch.randn(2, 8, *(5, 4, 6)[:spatial_dims], dtype=torch.float64)
    expected = torch.stack([flat(part) for part in x.unbind(2 + axis)], 2 + axis)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(accelerate(layer)(x), expected)


def test_device_and_dtype():
    layer = GnConv(16, order=3, global_filter=(4, 3), device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


def test_nothing_is_printed(capfd):
    gnconv(16, order=2)(torch.randn(1, 16, 8, 8))
    assert capfd.readouterr() == ("", "")
