"""Weights in other forms: the same to the last bit, for this project and for timm alone."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch

from checkpoints.reading import read_checkpoint
from checkpoints.run_folder import save_checkpoint
from checkpoints.sources import continued
from config.command_line import parse_args
from inference import convert as conversion
from inference.classifier import load_classifier
from models import plain
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from tests.drawings import draw
from tools.convert import main

CLASSES = ["ant", "bee", "cat"]
IMAGE = draw("cross", np.random.RandomState(0), size=90).crop((0, 0, 90, 70))


CASES = {
    "crop": {"input_size": 64},
    "other crop": {"input_size": 64, "crop_pct": 0.9, "imagenet_default_mean_and_std": False},
    "no layer scale": {"input_size": 64, "layer_scale_init_value": 0.0},
    "warped": {"input_size": 32},
    "an earlier run": {"input_size": 64, "data_set": "image_folder"},
    "a grey background": {"input_size": 64, "data_set": "tar", "exif_orientation": None}
    | {"background": "#808080"},
}


@pytest.fixture(
    params=[
        pytest.param(flags, id=name, marks=[pytest.mark.slow] * (name in ("crop", "warped")))
        for name, flags in CASES.items()
    ]
)
def source(request, tmp_path):
    """A checkpoint of a model with another filter size, and its average."""
    flags = request.param
    kwargs = {"global_filters": [None, None, [6, 5], [2, 2]]}
    scale = {"layer_scale_init_value": flags.get("layer_scale_init_value", 1e-6)}
    state = {}
    for seed, name in enumerate(("model", "model_ema")):
        torch.manual_seed(seed)
        state[name] = timm.create_model(
            "hornet_atto_gf", num_classes=3, **kwargs, **scale
        ).state_dict()
    flags = {"model": "hornet_atto_gf", "model_kwargs": kwargs} | flags
    state |= {"args": flags, "classes": CLASSES}
    save_checkpoint(state, tmp_path / "source.pth")
    return tmp_path / "source.pth"


def convert(source, output, *arguments):
    assert main([str(source), str(output), *arguments]) == 0
    return output


def assert_same(first, second):
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.classes == second.classes == CLASSES
    assert first.preprocessing == second.preprocessing
    torch.testing.assert_close(
        first.preprocessing.transform(IMAGE), second.preprocessing.transform(IMAGE), rtol=0, atol=0
    )


def test_there_and_back_again(source, tmp_path):
    first = load_classifier(str(source))
    path = source
    for name in ("a.safetensors", "folder", "b.pth", "folder2", "c.safetensors"):
        path = convert(path, tmp_path / name)
        assert_same(first, load_classifier(str(path)))
    assert (tmp_path / "b.pth").stat().st_mode & 0o777 == path.stat().st_mode & 0o777


def test_the_average_in_the_form_of_the_release(source, tmp_path):
    released = torch.load(convert(source, tmp_path / "a.pth", "--ema"), weights_only=True)
    average = read_checkpoint(source)["model_ema"]
    assert released["model"].keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in released["model"].items())


def test_timm_loads_the_folder(source, tmp_path):
    folder = convert(source, tmp_path / "folder")
    ours = load_classifier(str(source))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    images = timm.data.create_transform(**config, is_training=False)(IMAGE)[None]
    torch.testing.assert_close(images[0], ours.preprocessing.transform(IMAGE))
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(ours.model)(images), rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASSES
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: unknown" in card  # whose weights they are is not ours to say
    assert "import hornet" in card


def test_a_thousand_names_of_ones_own(tmp_path):
    network = timm.create_model("hornet_atto_7x7", num_classes=1000)
    names = [f"class {number}" for number in range(1000)]
    flags = {"model": "hornet_atto_7x7", "input_size": 64}
    state = {"model": network.state_dict(), "args": flags, "classes": names}
    torch.save(state, tmp_path / "a.pth")
    folder = convert(tmp_path / "a.pth", tmp_path / "folder")
    assert json.loads((folder / "config.json").read_text())["label_names"] == names


@pytest.mark.parametrize("count", [10, 1000])
def test_numbered_classes_in_a_folder(tmp_path, count):
    """Numbers are kept, but those of ImageNet, for which transformers has names."""
    network = timm.create_model("hornet_atto_7x7", num_classes=count)
    flags = {"model": "hornet_atto_7x7", "input_size": 64}
    torch.save({"model": network.state_dict(), "args": flags}, tmp_path / "a.pth")
    content = json.loads(
        (convert(tmp_path / "a.pth", tmp_path / "folder") / "config.json").read_text()
    )
    assert content.get("label_names") == (list("0123456789") if count == 10 else None)
    # transformers passes num_classes itself
    assert content["num_classes"] == count
    assert "num_classes" not in content["model_args"]


@pytest.mark.parametrize("form", ["a.safetensors", "folder"])
def test_a_run_starts_from_it(source, tmp_path, form):
    path = convert(source, tmp_path / form)
    config = parse_args(["--model", "auto", "--finetune", str(path)])
    context = DistributedContext(0, 0, 1, torch.device("cpu"))
    model = continued(config, context)[0].model
    assert model.model == "hornet_atto_gf"
    assert model.model_kwargs["global_filters"] == [None, None, [6, 5], [2, 2]]
    # the new run's flags give these
    assert not {"num_classes", "head_init_scale", "drop_path_rate"} & model.model_kwargs.keys()
    assert not model.model_kwargs.get("layer_scale_init_value")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "a.pth"], "none.pth does not exist"),
        (["weights.pth", "a.pth"], "does not name its model: give --model"),
        (["weights.pth", "a.pth", "--model", "hornet_tiny_7x7"], "of another model"),
        (["weights.pth", "a.pth", "--model", "hornet_ato_7x7"], "near names: hornet_atto_7x7"),
        (["weights.pth", "a.bin", "--model", "hornet_atto_7x7"], "a folder without a suffix"),
        (["weights.pth", "folder", "--model", "hornet_atto_7x7"], "exists already"),
        (["weights.pth", "none/a.pth", "--model", "hornet_atto_7x7"], "is not a folder"),
        (["weights.pth", "a.pth", "--model", "hornet_atto_7x7", "--ema"], "no EMA"),
        (["folder", "a.pth"], "config.json is not timm's format"),
        (["weights.pth", "weights.pth", "--model", "hornet_atto_7x7"], "exists already"),
        (["a.onnx", "a.pth"], "is exported: give the checkpoint"),
        (["resnet.pth", "new", "--model", "resnet18"], "folders are for HorNets, not resnet18"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("hornet_atto_7x7").state_dict(), "weights.pth")
    torch.save(timm.create_model("resnet18").state_dict(), "resnet.pth")
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


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The folder of a model of three classes."""
    folder = tmp_path_factory.mktemp("converted")
    torch.manual_seed(0)
    state = {"model": timm.create_model("hornet_atto_7x7", num_classes=3).state_dict()}
    torch.save(state | {"args": {"model": "hornet_atto_7x7", "input_size": 64}}, folder / "a.pth")
    return convert(folder / "a.pth", folder / "model")


def changed(folder, **values):
    """The folder with other values of the preprocessing, or of what is beside it."""
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    for name, value in values.items():
        (facts["pretrained_cfg"] if name in facts["pretrained_cfg"] else facts)[name] = value
    path.write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.5] * 3, "std": [0.2] * 3}, ""),
        ({"std": [0.0] * 3}, "std"),
        ({"mean": "abc"}, "could not convert"),
        ({"interpolation": "bilinear"}, "interpolation bilinear instead of bicubic"),
        ({"crop_mode": "border"}, "crop_mode border"),
        ({"crop_mode": "squash"}, "crop_mode squash at 64 pixels"),
        ({"crop_pct": -1}, "crop_pct -1"),
        ({"crop_pct": "x"}, "could not convert"),
        ({"input_size": [3, 64, 96]}, ""),
        ({"input_size": [4, 64, 64]}, "is of another model"),
        ({"input_size": [3, 0, 0]}, "input size [0, 0]"),
        ({"label_names": ["a"]}, "not a list of 3 names"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "model_kwargs have checkpoint_path"),
        ({"pretrained_cfg": None}, "not timm's format"),
    ],
)
def test_folders_of_others(converted, tmp_path, values, message):
    """They are prepared for as timm does, or refused."""
    folder = changed(shutil.copytree(converted, tmp_path / "folder"), **values)
    if message:
        with pytest.raises(UserError, match=re.escape(message)):
            load_classifier(str(folder))
        return
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)(IMAGE)
    torch.testing.assert_close(load_classifier(str(folder)).preprocessing.transform(IMAGE), theirs)


def test_what_loading_would_change_is_refused(tmp_path, capsys):
    small = timm.create_model("hornet_atto_gf", global_filters=(None, None, (6, 5), (2, 2)))
    torch.save(small.state_dict(), tmp_path / "small.pth")
    double = timm.create_model("hornet_atto_7x7").double().state_dict()
    torch.save({k: v + 1e-9 for k, v in double.items()}, tmp_path / "double.pth")
    half = timm.create_model("hornet_atto_7x7").half().state_dict()
    torch.save(half, tmp_path / "half.pth")
    for name, model, message in (
        ("small", "hornet_atto_gf", "its arguments (model_kwargs) are not in the file"),
        ("double", "hornet_atto_7x7", "is torch.float64, more than the model's torch.float32"),
        ("half", "hornet_atto_7x7", ""),
    ):
        command = [str(tmp_path / f"{name}.pth"), str(tmp_path / f"{name}.safetensors")]
        assert main([*command, "--model", model]) == bool(message)
        assert message in capsys.readouterr().err


def test_a_form_that_reads_otherwise_is_not_kept(source, tmp_path, capsys, monkeypatch):
    flags = conversion._flags

    def forgetful(classifier):
        return flags(classifier) | {"std": [0.1, 0.2, 0.3]}

    monkeypatch.setattr(conversion, "_flags", forgetful)
    assert main([str(source), str(tmp_path / "a.pth")]) == 1
    assert "reads as something else than was written" in capsys.readouterr().err
    assert not (tmp_path / "a.pth").exists()
