"""What the pictures show is what the mathematics says of networks that are known."""

import pytest
import timm
import torch
from torch import nn

from inference import insight
from models import GlobalLocalFilter, GnConv
from models.spectral import spectral_filter


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

    @property
    def stages(self):
        return [self.layers]

    def forward_intermediates(self, images):
        x = self.layers(images)
        return x, [x]

    def forward(self, images):
        return self.forward_head(self.layers(images))

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
    assert maps[insight._deepest(maps)].shape[-1] == 4
    field = insight.effective_receptive_field(network, torch.randn(1, 3, 64, 64))
    assert field.shape == (64, 64)
    assert field.max() == 1


class Signed(Local):
    """One convolution, with weights of both signs; class k counts channel 0 less 2 k channel 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Conv2d(3, 2, 3, padding=1)

    def forward_head(self, x):
        first, second = x.mean((2, 3)).unbind(1)
        return torch.stack([first - 2 * k * second for k in range(3)], 1)


def test_the_field_of_signed_weights():
    """Colours and images add up without their signs, channels only where they are positive."""
    network, images = Signed(), torch.randn(6, 3, 9, 9)
    expected = torch.zeros(9, 9)
    for positive in network.layers(images)[:, :, 4, 4] > 0:
        expected[3:6, 3:6] += network.layers.weight[positive].sum(0).abs().sum(0).detach()
    field = insight.effective_receptive_field(network, images)
    torch.testing.assert_close(field, expected / expected.max())
    nothing = insight.effective_receptive_field(Local(), torch.full((1, 3, 9, 9), -1.0))
    assert not nothing.any()
    assert insight.width_of_field(nothing) == 9


def test_grad_cam_of_signed_weights():
    network, images = Signed(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        first, second = network.layers(images).unbind(1)
    for label in range(3):
        maps = insight.grad_cam(network, images, torch.tensor([label, label]))
        expected = (first - 2 * label * second).relu()
        expected = expected / expected.amax((1, 2), keepdim=True)
        torch.testing.assert_close(maps, expected)
    # nothing speaks for a class: no place, instead of a division by zero
    assert not insight.grad_cam(Local(), torch.full((1, 3, 9, 9), -1.0), torch.tensor([0])).any()


def test_filters_in_space_do_what_the_layer_does(network):
    """Convolving with the filter in space is the layer's global half, on the maps of 224 pixels."""
    found = insight.global_filters(network)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, GlobalLocalFilter)}
    assert found.keys() == layers.keys()
    sizes = {"stages.2": 14, "stages.3": 7}
    for name in ("stages.2.0.gnconv.dwconv", "stages.3.1.gnconv.dwconv"):
        (frequency, space), layer = found[name], layers[name]
        size = sizes[name[:8]]
        assert space.shape == frequency.shape == (len(layer.complex_weight), size, size)
        x = torch.randn(1, len(space), size, size)
        expected = spectral_filter(x, layer.complex_weight.detach())[0]
        y = torch.zeros_like(expected)
        for row in range(size):
            for column in range(size):
                moved = x[0].roll((row - size // 2, column - size // 2), (1, 2))
                y += space[:, row, column, None, None] * moved
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        # the stored half, but for the columns that are their own opposites, is that of the whole
        kernel = torch.view_as_complex(layer.complex_weight.detach())
        inner = slice(1, (size - 1) // 2 + 1)
        whole = torch.fft.ifftshift(frequency, dim=(1, 2))
        torch.testing.assert_close(whole[:, :, inner], kernel[:, :, inner].abs(), rtol=1e-3,
                                   atol=1e-5)  # fmt: skip


def test_a_filter_that_shifts(network):
    """In space it is a single one, as far from the middle as it shifts."""
    layer = network.stages[3][0].gnconv.dwconv
    columns = torch.arange(4) * 2 * torch.pi / 7
    turned = torch.polar(torch.ones(7, 4), (-2 * columns).expand(7, 4))
    layer.complex_weight.data.copy_(torch.view_as_real(turned).expand_as(layer.complex_weight))
    _, space = insight.global_filters(network)["stages.3.0.gnconv.dwconv"]
    expected = torch.zeros(7, 7)
    expected[3, 5] = 1
    torch.testing.assert_close(space[0], expected, rtol=0, atol=1e-5)


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
        torch.testing.assert_close(found, q.abs().mean(1), rtol=1e-4, atol=1e-6)
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
