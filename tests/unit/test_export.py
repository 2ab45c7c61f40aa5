"""Exported files give what the model gives, and bad exports end in one line."""

import pytest
import torch

from runtime.errors import UserError
from tools import export
from tools.classifier import load_classifier
from tools.export import main
from tools.exported import FORMATS, Exported

SMALL = ["--input-size", "64"]


def exported(tmp_path, kind, *arguments):
    file = tmp_path / f"model{FORMATS[kind]}"
    assert main([*arguments, *SMALL, "--output", str(file)]) == 0
    # OpenVINO has its weights in a second file
    assert {path.stem for path in tmp_path.iterdir()} == {"model"}
    return file


@pytest.mark.parametrize(
    "kind",
    [
        "torchscript",
        *(pytest.param(k, marks=pytest.mark.slow) for k in FORMATS if k != "torchscript"),
    ],
)
@pytest.mark.parametrize("model", ["hornet_atto_7x7", "hornet_atto_gf"])
def test_any_number_and_size_of_images(tmp_path, capsys, kind, model):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}.get(kind, "torch"))
    file = exported(tmp_path, kind, model, "--dynamic", "size")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "2 x 3 x 64 x 64", "3 x 3 x 64 x 64", "1 x 3 x 96 x 160",
    ]  # fmt: skip
    # the weights are drawn with a fixed seed: a second model is an oracle of its own
    reference = export.random_classifier(model, 64)
    images = torch.randn(5, 3, 96, 64)
    with torch.no_grad():
        expected = reference.model(images)
        error = (load_classifier(str(file)).model(images) - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_a_fixed_batch_takes_any_number_of_images(tmp_path):
    network = Exported(exported(tmp_path, "torchscript", "hornet_atto_7x7", "--batch-size", "2"))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        one_by_one = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), one_by_one, rtol=1e-4, atol=1e-5)
    assert network.facts.model == "hornet_atto_7x7"
    assert network.facts.input_size == 64


def test_a_file_that_gives_something_else_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.LARGEST_ERROR, "bfloat16", 1e-6)
    file = tmp_path / "model.torchscript"
    file.write_text("an older one")
    arguments = ["hornet_atto_7x7", *SMALL, "--dtype", "bfloat16", "--output", str(file)]
    assert main(arguments) == 1
    assert "of the largest logit, more than 1e-06: it is not kept" in capsys.readouterr().err
    assert file.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hornet_atto_7x7", "--output", "a.bin"], "the suffix is one of .onnx, .torchscript"),
        (["hornet_atto_7x7", "--output", "a.onnx", "--format", "exported"], "ends in .pt2"),
        (["hornet_atto_7x7", "--output", "/nowhere/a.onnx"], "/nowhere is no folder"),
        (["hornet_ato_7x7", "--output", "a.onnx"], "near names: hornet_atto_7x7"),
        (["--output", "a.onnx"], "give --checkpoint FILE, or a model"),
        (["--checkpoint", "none.pth", "--output", "a.onnx"], "none.pth"),
        (["hornet_atto_7x7", "--batch-size", "0", "--output", "a.onnx"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS.values())
def test_a_damaged_file(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"nothing of use")
    with pytest.raises(UserError, match=r"no file that tools\.export has written|needs"):
        Exported(tmp_path / f"a{suffix}")
