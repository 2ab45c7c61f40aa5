"""gnConv and HorNet in other people's networks: each example does what it says."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50, resnext50_32x4d

from examples import faster_rcnn, linear_probe, resnet, unet, unet3d, yolo
from models import GnConv


@pytest.mark.slow
def test_unet_learns_to_segment():
    assert unet.main() > 0.8
    # a stage alone: other widths out than in, maps of any size
    assert unet.Stage(24, 40)(torch.randn(2, 24, 9, 7)).shape == (2, 40, 9, 7)


@pytest.mark.slow
def test_unet_of_volumes_learns_to_segment():
    assert unet3d.main() > 0.8


@pytest.mark.slow
def test_resnet_has_gnconvs_and_learns(capsys):
    model = resnet.main()
    assert "13 gnConvs: logits (1, 10)" in capsys.readouterr().out
    plain = resnet50(num_classes=10)
    changed = resnet.with_gnconv(resnet50(num_classes=10))
    kept = {name: value for name, value in plain.state_dict().items() if "conv2" not in name}
    missing, unexpected = changed.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(".conv2." in name for name in missing)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    for layer in model.modules():
        if isinstance(layer, GnConv):
            assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_yolo_follows_its_definition():
    assert yolo.main().shape == (1, 64, 96 // 8, 128 // 8)
    deeper = yolo.Model(
        {"backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 3, "C3HB", [16]]], "head": []}
    )
    assert sum(isinstance(layer, yolo.HorBlock) for layer in deeper.modules()) == 3
    # Ultralytics' calling convention: input, output, repeats
    layer = yolo.C3HB(12, 24, 2)
    layer(torch.randn(2, 12, 10, 14)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.eval()(torch.randn(1, 12, 10, 14)).shape == (1, 24, 10, 14)
    # its HorBlocks count, and one stands alone in a definition
    x = torch.randn(1, 12, 10, 14)
    before = layer(x)
    layer.m[1].block.gamma1.data.zero_()
    assert not torch.allclose(layer(x), before)
    alone = yolo.Model({"backbone": [[-1, 1, "Conv", [16]], [-1, 1, "HorBlock", [16]]], "head": []})
    assert alone(torch.randn(2, 3, 8, 8)).shape == (2, 16, 8, 8)
    with pytest.raises(ValueError, match="Conv cannot be repeated 3 times"):
        yolo.Model({"backbone": [[-1, 3, "Conv", [16]]], "head": []})
    with pytest.raises(ValueError, match="it cannot give 32"):
        yolo.HorBlock(16, 32)


@pytest.mark.parametrize("model", [resnet18, resnext50_32x4d])
def test_resnet_without_such_convolutions_is_refused(model):
    with pytest.raises(ValueError, match="no 3x3 convolution of stride 1"):
        resnet.with_gnconv(model())


@pytest.mark.slow
def test_faster_rcnn_trains_and_detects():
    losses = faster_rcnn.main()
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())
    model = faster_rcnn.detector("hornet_atto_7x7", num_classes=3)
    assert isinstance(model.backbone.body, nn.Module)
    with torch.no_grad():
        maps = model.backbone(torch.rand(1, 3, 128, 160))
        (found,) = model.eval()([torch.rand(3, 128, 160)])
    assert [x.shape[1:] for x in maps.values()] == [
        (256, 32, 40), (256, 16, 20), (256, 8, 10), (256, 4, 5), (256, 2, 3),
    ]  # fmt: skip
    assert found["boxes"].shape[1:] == (4,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_linear_probe_of_frozen_features():
    assert linear_probe.main() > 0.9
