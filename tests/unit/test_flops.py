"""tools.flops against recorded facts; the models through torch.hub."""

import json
from pathlib import Path

import pytest
import timm
import torch

from tools import flops
from utils import activations_of

ROOT = Path(__file__).parents[2]
ZOO = json.loads((ROOT / "tests/golden/model_zoo.json").read_text())["models"]


def rows(text):
    """Part -> parameters, GMACs, GMACs of FFTs."""
    lines = [line.split() for line in text.splitlines()[1:]]
    return {
        words[0]: (int(words[-3].replace(",", "")), float(words[-2]), float(words[-1]))
        for words in lines
    }


@pytest.mark.parametrize("name", ZOO)
def test_recorded_facts(name, capsys):
    assert flops.main([name]) == 0
    table = rows(capsys.readouterr().out)
    parameters, gmacs, of_ffts = table.pop("all")
    recorded = ZOO[name]
    assert parameters == recorded["params"]
    total = recorded["gmacs"] + recorded["gmacs_fft"]
    assert gmacs == pytest.approx(total, rel=1e-3)
    assert of_ffts == pytest.approx(recorded["gmacs_fft"], abs=1e-4)
    # nothing is left out of the stages
    assert sum(row[0] for row in table.values()) == parameters
    assert sum(row[1] for row in table.values()) == pytest.approx(gmacs, abs=1e-3)
    assert len([part for part in table if part.startswith("stages.")]) == 4


def test_other_models_sizes_and_classes(capsys):
    assert flops.main(["resnet18", "--input-size", "64", "--num-classes", "10"]) == 0
    table = rows(capsys.readouterr().out)
    # torchvision's count of ResNet-18, less 990 rows of the head
    assert table["all"][0] == 11_689_512 - 990 * 513
    assert table["fc"] == (5130, 0.0, 0.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["hornet_tinny_gf"], "there is no model hornet_tinny_gf; near names: hornet_tiny_gf"),
        (["hornet_tiny_gf", "--input-size", "16"], "--input-size 16: hornet_tiny_gf fails"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert flops.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_torch_hub():
    model = torch.hub.load(str(ROOT), "hornet_atto_gf", source="local", num_classes=3)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(RuntimeError, match="Cannot find callable GnConv"):
        torch.hub.load(str(ROOT), "GnConv", source="local")


def test_activations_are_counted_as_by_timm():
    # its published tables: 11.11 and 13.44 million
    for name, expected in (("resnet50", 11.11), ("convnext_tiny", 13.44)):
        with torch.device("meta"):
            model, image = timm.create_model(name), torch.empty(1, 3, 224, 224)
        assert activations_of(model, image) / 1e6 == pytest.approx(expected, abs=0.005)
