"""Exported files, as their users get them, and the logits of the network in PyTorch."""

from pathlib import Path

import pytest
import torch

from inference import export
from tests.drawings import write_drawings
from tools.export import main

PLACE = Path(__file__).parents[2] / "build/clients"
SIDE = 64
MODELS = ["hornet_atto_7x7", "hornet_atto_gf"]


@pytest.fixture(scope="session", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="session")
def expected(model):
    """Two images, and the logits by the definition: the plain model, with FFTs."""
    network = export.random_classifier(model, SIDE).model
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, network(images)


@pytest.fixture
def exported(model, tmp_path):
    """exported(target, suffix, ...) writes a file with tools.export."""

    def write(target, suffix, *more):
        file = tmp_path / f"mine{suffix}"
        arguments = [model, "--target", target, "--input-size", str(SIDE), "--output", str(file)]
        assert main([*arguments, *map(str, more)]) == 0
        return file

    return write


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    write_drawings(folder, 10)
    return folder


def error(logits, expected):
    """Largest difference, relative to the largest logit."""
    logits = torch.as_tensor(logits).reshape(expected.shape)
    return float((logits - expected).abs().max() / expected.abs().max())
