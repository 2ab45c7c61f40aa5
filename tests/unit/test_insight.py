"""What the pictures show is what the mathematics says of networks that are known."""

import pytest
import timm
import torch
from torch import nn

from models import GlobalLocalFilter, GnConv
from tools import insight


@pytest.fixture
def network():
    torch.manual_seed(0)
    options = {"num_classes": 3, "layer_scale_init_value": 0.5}
    return timm.create_model("hornet_atto_gf", **options).eval()


class Local(nn.Module):
    """Two convolutions of 3x3, then pooling: the middle sees 5x5 pixels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        for layer in self.layers:
            nn.init.constant_(layer.weight, 1.0)

    def forward_intermediates(self, images):
        x = self.layers(images)
        return x, [x]

    def forward_head(self, x):
        return x.mean((2, 3))


def test_the_field_of_two_convolutions():
    field = insight.effective_receptive_field(Local(), torch.rand(2, 3, 15, 15))
    counts = torch.tensor([1.0, 2, 3, 2, 1])  # paths to the middle, in each direction
    expected = torch.zeros(15, 15)
    expected[5:10, 5:10] = counts[:, None] * counts / 9
    torch.testing.assert_close(field, expected)
    assert insight.width_of_field(field, 0.11) == 1
    assert insight.width_of_field(field, 0.6) == 3
    assert insight.width_of_field(field, 0.99) == 5
    moved = field.roll((4, -5), (0, 1))  # the middle of an even map is not the image's
    assert insight.width_of_field(moved, 0.6) == 3


def test_the_field_of_small_images_is_that_of_an_earlier_stage(network):
    with torch.no_grad():
        _, maps = network.forward_intermediates(torch.randn(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [16, 8, 4, 2]
    assert insight._deepest(network, torch.randn(1, 3, 64, 64))[1].shape[-1] == 4
    field = insight.effective_receptive_field(network, torch.randn(1, 3, 64, 64))
    assert field.shape == (64, 64)
    assert field.max() == 1


def test_filters_in_space_do_what_the_layer_does(network):
    """Convolving with the filter in space is the layer's global half."""
    found = insight.global_filters(network)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, GlobalLocalFilter)}
    assert found.keys() == layers.keys()
    name, layer = next(iter(layers.items()))
    frequency, space = found[name]
    channels, height, width = space.shape
    half = layer.complex_weight.shape[2]
    assert (channels, height, width) == (len(layer.complex_weight), 14, 2 * (half - 1))
    x = torch.randn(channels, height, width)
    kernel = torch.view_as_complex(layer.complex_weight.detach())
    expected = torch.fft.irfft2(torch.fft.rfft2(x) * kernel, s=(height, width))
    y = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            moved = x.roll((row - height // 2, column - width // 2), (1, 2))
            y += space[:, row, column, None, None] * moved / (height * width) ** 0.5
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    # what is symmetric in frequency is the stored magnitude: a frequency's and its opposite's
    centre = frequency[:, height // 2, width // 2]
    torch.testing.assert_close(centre, kernel[:, 0, 0].real.abs(), rtol=1e-4, atol=1e-5)


def test_gates_are_those_of_the_recursion(network):
    images = torch.randn(2, 3, 64, 64)
    maps = insight.gate_maps(network, images)
    names = ["stages.0.1.gnconv", "stages.1.1.gnconv", "stages.2.5.gnconv", "stages.3.1.gnconv"]
    assert list(maps) == names
    assert [len(orders) for orders in maps.values()] == [2, 3, 4, 5]
    # by hand, for the first stage's
    with torch.no_grad():
        x = network.stages[0][0](network.downsample_layers[0](images))
        block = network.stages[0][1]
        layer = block.gnconv
        assert isinstance(layer, GnConv)
        q_all = layer.proj_in(block.norm1(x))[:, layer.dims[0] :]
        q_all = layer.scale * layer.dwconv(q_all)
    for found, q in zip(maps[names[0]], q_all.split(layer.dims, 1), strict=True):
        ratio = found / q.abs().mean(1)  # the scale may be multiplied in before or after
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert not layer.dwconv._forward_hooks


def test_grad_cam_finds_the_place_that_counts():
    class Corner(Local):
        """Channel 0 is the brightness, and the only one that class 1 counts."""

        def __init__(self):
            super().__init__()
            self.layers = nn.AvgPool2d(4)

        def forward_head(self, x):
            return torch.stack((x[:, 1].mean((1, 2)), x[:, 0].mean((1, 2))), 1)

    images = torch.zeros(1, 3, 32, 32)
    images[:, 0, :8, 24:] = 1
    cam = insight.grad_cam(Corner(), images, torch.tensor([1]))
    assert cam.shape == (1, 32, 32)
    assert cam[0, :4, 28:].min() > 0.9
    assert cam[0, 16:, :16].max() == 0
    predicted = insight.grad_cam(Corner(), images)
    torch.testing.assert_close(predicted, cam)
