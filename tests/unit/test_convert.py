"""Weights in other forms: the same to the last bit, for this project and for timm alone."""

import json

import numpy as np
import pytest
import timm
import torch

from cli import parse_args
from runtime import checkpoint
from runtime.distributed import DistributedContext
from tests.drawings import draw
from tools.classifier import load_classifier
from tools.convert import main
from weights import with_model_of_weights

CLASSES = ["ant", "bee", "cat"]
IMAGE = draw("cross", np.random.RandomState(0), size=90).crop((0, 0, 90, 70))


@pytest.fixture(params=[(64, None), (64, 0.9), (32, None)], ids=str)
def source(request, tmp_path):
    """A checkpoint of a model with another filter size, and its average."""
    size, crop_pct = request.param
    kwargs = {"global_filters": [None, None, [6, 5], [2, 2]]}
    state = {}
    for seed, name in enumerate(("model", "model_ema")):
        torch.manual_seed(seed)
        state[name] = timm.create_model("hornet_atto_gf", num_classes=3, **kwargs).state_dict()
    flags = {"model": "hornet_atto_gf", "model_kwargs": kwargs, "input_size": size}
    state |= {"args": flags | {"crop_pct": crop_pct}, "classes": CLASSES}
    checkpoint.save(state, tmp_path / "source.pth")
    return tmp_path / "source.pth"


def convert(source, output, *arguments):
    assert main([str(source), str(output), *arguments]) == 0
    return output


def assert_same(first, second):
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.classes == second.classes == CLASSES
    torch.testing.assert_close(first.transform(IMAGE), second.transform(IMAGE), rtol=0, atol=0)


def test_there_and_back_again(source, tmp_path):
    first = load_classifier(str(source))
    path = source
    for name in ("a.safetensors", "folder", "b.pth", "folder2", "c.safetensors"):
        path = convert(path, tmp_path / name)
        assert_same(first, load_classifier(str(path)))
    assert (tmp_path / "b.pth").stat().st_mode & 0o777 == path.stat().st_mode & 0o777


def test_the_average_in_the_form_of_the_release(source, tmp_path):
    released = torch.load(convert(source, tmp_path / "a.pth", "--ema"), weights_only=True)
    average = checkpoint.load(source)["model_ema"]
    assert released["model"].keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in released["model"].items())


def test_timm_loads_the_folder(source, tmp_path):
    folder = convert(source, tmp_path / "folder")
    ours = load_classifier(str(source))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    images = timm.data.create_transform(**config, is_training=False)(IMAGE)[None]
    torch.testing.assert_close(images[0], ours.transform(IMAGE))
    with torch.no_grad():
        torch.testing.assert_close(model(images), ours.model(images), rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASSES
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit" in card
    assert "import hornet" in card


@pytest.mark.parametrize("form", ["a.safetensors", "folder"])
def test_a_run_starts_from_it(source, tmp_path, form):
    path = convert(source, tmp_path / form)
    config = parse_args(["--model", "auto", "--finetune", str(path)])
    context = DistributedContext(0, 0, 1, torch.device("cpu"))
    model = with_model_of_weights(config, context).model
    assert model.model == "hornet_atto_gf"
    assert model.model_kwargs["global_filters"] == [None, None, [6, 5], [2, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "a.pth"], "none.pth does not exist"),
        (["weights.pth", "a.pth"], "does not name its model: give --model"),
        (["weights.pth", "a.pth", "--model", "hornet_tiny_7x7"], "of another model"),
        (["weights.pth", "a.pth", "--model", "hornet_ato_7x7"], "near names: hornet_atto_7x7"),
        (["weights.pth", "a.bin", "--model", "hornet_atto_7x7"], "a folder without a suffix"),
        (["weights.pth", "folder", "--model", "hornet_atto_7x7"], "exists already"),
        (["weights.pth", "none/a.pth", "--model", "hornet_atto_7x7"], "is no folder"),
        (["weights.pth", "a.pth", "--model", "hornet_atto_7x7", "--ema"], "no moving average"),
        (["folder", "a.pth"], "config.json is none of timm's"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("hornet_atto_7x7").state_dict(), "weights.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"architecture": "hornet_atto_7x7"}')
    if arguments[0] == "folder":
        convert("weights.pth", "other", "--model", "hornet_atto_7x7")
        (tmp_path / "other" / "model.safetensors").rename("folder/model.safetensors")
        capsys.readouterr()
    before = {path: path.stat().st_mtime for path in tmp_path.iterdir()}
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime for path in tmp_path.iterdir()} == before
