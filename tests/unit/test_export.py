"""Exported files give what the model gives, and bad exports end in one line."""

import copy
import errno
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import reparameterize_model

import models
from inference import export, quantize
from inference.classifier import load_classifier
from inference.exported import FORMATS, Exported, Facts, companions, quiet_library
from inference.portable import portable
from inference.prediction import predictions
from inference.targets import OPSETS, Options
from input_pipeline.images import Decoding
from models.layers import ChannelLinear
from runtime.errors import MissingPackageError, UserError
from tests.drawings import CLASSES as SHAPES
from tests.drawings import write_drawings
from tools.export import main

SMALL = ["--input-size", "64"]
ANY = ["--dynamic", "batch"]
INT8 = ["--dtype", "int8", "--calibration"]


def exported(tmp_path, kind, *arguments):
    file = tmp_path / f"model{FORMATS[kind]}"
    assert main([*arguments, *SMALL, "--output", str(file)]) == 0
    # OpenVINO has its weights in a second file
    assert {path.stem for path in tmp_path.iterdir()} == {"model"}
    return file


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A checkpoint of a GF network of five blocks: any size takes seconds more for each."""
    path, kwargs = tmp_path_factory.mktemp("shallow") / "gf.pth", {"depths": [1, 1, 2, 1]}
    network = export.randomize(timm.create_model("hornet_atto_gf", **kwargs))
    about = {"model": "hornet_atto_gf", "model_kwargs": kwargs}
    torch.save({"model": network.state_dict(), "args": about}, path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("torchscript", "hornet_atto_7x7"),
        ("torchscript", "hornet_atto_gf"),
        *(
            pytest.param(kind, "shallow", marks=pytest.mark.slow)
            for kind in ("onnx", "exported", "openvino")
        ),
    ],
)
def test_any_number_and_size_of_images(tmp_path, capsys, shallow, kind, model):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}.get(kind, "torch"))
    is_random = model != "shallow"
    source = [model] if is_random else ["--checkpoint", shallow]
    file = exported(tmp_path, kind, *source, "--dynamic", "size")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "2 x 3 x 64 x 64", "3 x 3 x 64 x 64", "1 x 3 x 96 x 160",
    ]  # fmt: skip
    # random weights are drawn with a fixed seed: a second model is an oracle of its own
    reference = export.random_classifier(model, 64) if is_random else load_classifier(shallow)
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
    error = capsys.readouterr().err
    assert "of the largest logit at 1 x 3 x 64 x 64, more than 1e-06: it is not kept" in error
    assert file.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hornet_atto_7x7", "--output", "a.bin"], "the suffix is one of .onnx, .torchscript"),
        (["hornet_atto_7x7", "--output", "a.onnx", "--format", "exported"],
         "--output a.onnx: files for --format exported end in .pt2"),
        (["hornet_atto_7x7", "--output", "/nowhere/a.onnx"], "/nowhere is not a folder"),
        (["hornet_ato_7x7", "--output", "a.onnx"], "near names: hornet_atto_7x7"),
        (["--output", "a.onnx"], "give --checkpoint FILE, or a model"),
        (["--checkpoint", "none.pth", "--output", "a.onnx"], "none.pth"),
        (["hornet_atto_7x7", "--batch-size", "0", "--output", "a.onnx"], "at least 1"),
        (["hornet_atto_7x7", "--output", "a.onnx", "--dtype", "int8"], "FOLDER go together"),
        (["hornet_atto_7x7", *INT8, "none", "--output", "a.onnx"], "none is not a folder"),
        (["hornet_atto_7x7", *INT8, ".", "--output", "a.onnx"], "folder . has no images"),
        (["hornet_atto_7x7", *INT8, ".", "--output", "a.pt2"],
         "--dtype int8: --output a.pt2 takes float32, float16, bfloat16"),
        (["--checkpoint", "a.onnx", "--output", "b.onnx"], "is exported: give the checkpoint"),
        (["hornet_atto_7x7", "--opset", "20", "--output", "a.pt2"], "--opset is ONNX's"),
        (["hornet_atto_7x7", "--ema", "--output", "a.pt2"], "give --checkpoint"),
        (["hornet_atto_7x7", "--dtype", "bfloat16", "--output", "a.onnx"],
         "--dtype bfloat16: --output a.onnx takes float32, float16, int8"),
        (["hornet_atto_7x7", "--target", "opencv", "--output", "a.pt2"],
         "files for --target opencv end in .onnx"),
        (["hornet_atto_7x7", "--target", "ncnn", "--format", "onnx",
          "--output", "a.ncnn.param"], "files for --format onnx end in .onnx"),
        (["hornet_atto_7x7", "--target", "opencv", "--opset", "18", "--output", "a.onnx"],
         "--opset 18: --target opencv takes 17 and 20"),
        (["hornet_atto_7x7", "--opset", "5", "--output", "a.onnx"],
         "--opset 5: --output a.onnx takes 13 to 23"),
        (["hornet_atto_7x7", "--opset", "99", "--output", "a.onnx"], "takes 13 to 23"),
        (["hornet_atto_7x7", "--target", "opencv", *ANY, "--output", "a.onnx"],
         "--dynamic batch: --target opencv takes fixed shapes"),
        (["hornet_atto_7x7", "--target", "tensorrt", "--dynamic", "size", "--output", "a.onnx"],
         "--dynamic size: --target tensorrt takes a fixed size"),
        (["hornet_atto_7x7", "--dtype", "float16", "--output", "a.tflite"],
         "--dtype float16: --output a.tflite takes float32"),
        (["hornet_atto_7x7", "--target", "mnn", *ANY, "--output", "a.onnx"], "takes fixed shapes"),
        (["hornet_atto_7x7", *ANY, "--output", "a.tflite"], "takes fixed shapes"),
        (["hornet_atto_7x7", "--target", "web", "--batch-size", "2", "--output", "a.onnx"],
         "--batch-size 2: --target web takes one image at a time"),
        (["hornet_atto_7x7", "--batch-size", "2", "--output", "a.ncnn.param"],
         "--output a.ncnn.param takes one image at a time"),
        (["hornet_atto_7x7", "--dynamic", "size", "--input-size", "32", "--output", "a.pt2"],
         "--dynamic size at 32 pixels: maps of one pixel would fix the size"),
        (["hornet_atto_7x7", *ANY, "--batch-size", "2", "--output", "a.onnx"], "one of them"),
        (["hornet_atto_7x7", "--output", "/proc/a.pt2"], "/proc/a.pt2 cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_limits():
    assert export.LARGEST_ERROR == {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def test_a_file_that_is_wrong_at_one_size_is_not_kept(tmp_path, capsys, monkeypatch):
    errors = {"2 x 3 x 64 x 64": 1e-6, "3 x 3 x 64 x 64": float("nan")}
    monkeypatch.setattr(export, "_errors", lambda *_: errors)
    command = ["hornet_atto_7x7", *SMALL, "--dynamic", "batch"]
    assert main([*command, "--output", str(tmp_path / "a.torchscript")]) == 1
    assert "by nan of the largest logit at 3 x 3 x 64 x 64" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision(tmp_path, capsys, dtype):
    file = exported(tmp_path, "torchscript", "hornet_atto_gf", "--dtype", dtype)
    told = capsys.readouterr().out.splitlines()[0]
    assert 1e-5 < float(told.split("error ")[1].split()[0]) < export.LARGEST_ERROR[dtype]
    assert file.stat().st_size < 10e6  # of 3.7 million parameters, two bytes each


def test_norms_and_scales_are_folded(tmp_path):
    counts = []
    for name, more in (("folded", []), ("plain", ["--no-fold"])):
        file = tmp_path / name / "a.torchscript"
        file.parent.mkdir()
        assert main(["hornet_atto_7x7", *SMALL, *more, "--output", str(file)]) == 0
        weights = torch.jit.load(file).state_dict()
        counts.append(sum("gamma" in key for key in weights))
    assert counts == [0, 24]  # two a block, of twelve


@pytest.mark.slow
def test_any_size_is_told_to_predict(tmp_path):
    network = exported(tmp_path, "torchscript", "hornet_atto_7x7", "--dynamic", "size")
    assert load_classifier(str(network), input_size=96).preprocessing.input_size == 96
    network.unlink()
    network = exported(tmp_path, "torchscript", "hornet_atto_7x7")
    with pytest.raises(UserError, match="are fixed"):
        load_classifier(str(network), input_size=96)


@pytest.mark.parametrize(
    "values",
    [{"classes": 5}, {"classes": [1, 2]}, {"input_size": 0}, {"input_size": "x"}, {"mean": "abc"},
     {"mean": [0.5]}, {"std": [0, 0, 0]}, {"crop_pct": "x"}, {"crop_pct": 7}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_facts_that_were_tampered_with(tmp_path, values):
    facts = asdict(Facts("m", ["a", "b"], 64, [0.5] * 3, [0.5] * 3, None, "float32", 1))
    module = torch.jit.trace(torch.nn.Flatten(), (torch.zeros(1, 3, 4, 4),))
    path = tmp_path / "a.torchscript"
    torch.jit.save(module, path, _extra_files={"hornet": json.dumps(facts | values)})
    with pytest.raises(UserError, match=r"not a file of tools\.export"):
        Exported(path)


def test_another_number_of_classes_than_named(tmp_path):
    facts = Facts("m", ["a", "b"], 64, [0.5] * 3, [0.5] * 3, None, "float32", 1)
    module = torch.jit.trace(torch.nn.Flatten(), (torch.zeros(1, 3, 4, 4),))
    torch.jit.save(module, tmp_path / "a.torchscript", _extra_files={"hornet": facts.dumps()})
    with pytest.raises(UserError, match="names 2 classes"):
        Exported(tmp_path / "a.torchscript")(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("name", ["a.torchscript", pytest.param("a.pt2", marks=pytest.mark.slow)])
def test_a_full_disk(tmp_path, capsys, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    (tmp_path / name).write_text("an older one")
    assert main(["hornet_atto_7x7", *SMALL, "--output", str(tmp_path / name)]) == 1
    expected = f"{tmp_path / name} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == f"tools.export: error: {expected}"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


def test_stopped_by_hand(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(export._WRITERS, "torchscript", stop)
    assert main(["hornet_atto_7x7", *SMALL, "--output", str(tmp_path / "a.torchscript")]) == 130
    assert capsys.readouterr().err == "tools.export: stopped\n"
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model(tmp_path, capsys):
    torch.save(timm.create_model("hornet_atto_7x7").state_dict(), tmp_path / "a.pth")
    output = tmp_path / "a.torchscript"
    arguments = ["hornet_atto_gf", "--checkpoint", str(tmp_path / "a.pth"), "--output", str(output)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "a.pth is of another model: it lacks " in error
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("opset", [OPSETS[0], 17, OPSETS[-1]])
def test_opsets(tmp_path, shallow, opset):
    onnx = pytest.importorskip("onnx")
    any_size = ["--dynamic", "size", "--opset", str(opset)]
    file = exported(tmp_path, "onnx", "--checkpoint", shallow, *any_size)
    onnx.checker.check_model(file, full_check=True)
    assert onnx.load(file).opset_import[0].version == opset


@pytest.mark.parametrize("model", ["hornet_atto_7x7", "hornet_atto_gf"])
def test_other_runtimes_get_constants(model):
    """No operator computes a weight, and pooling is a mean."""
    classifier = export.random_classifier(model, 64)
    images = torch.randn(2, 3, 64, 64)
    folded = reparameterize_model(copy.deepcopy(classifier.model), inplace=True)
    network = portable(folded, images.shape).eval()
    program = torch.export.export(network, (images,))
    for node in program.graph.nodes:
        names = [argument.name for argument in node.all_input_nodes]
        assert not names or not all(name.startswith(("p_", "b_")) for name in names)
        assert "adaptive" not in str(node.target)
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("aten.linear.default") == 1  # the head
    with torch.no_grad():
        expected = classifier.model(images)
        error = (program.module()(images) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.slow
def test_an_accelerated_model_has_the_same_program(strict):
    network = models.accelerate(export.random_classifier("hornet_atto_7x7", 64).model)
    program = torch.export.export(network, (torch.randn(1, 3, 64, 64),), strict=strict)
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("aten.linear.default") == 1  # the head


@pytest.mark.parametrize("kind", [models.GlobalLocalFilter, ChannelLinear])
def test_layers_of_other_types_are_exported_as_they_are(kind):
    class Twice(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    network = export.random_classifier("hornet_atto_gf", 64).model
    for layer in network.modules():
        if type(layer) is kind:
            layer.__class__ = Twice
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        found = portable(copy.deepcopy(network), images.shape)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 32, 64), (1, 3, 96, 64)])
def test_filters_of_fixed_sizes(shape):
    """Down to maps of one pixel, and of one row."""
    network = export.random_classifier("hornet_atto_gf", 64).model
    images = torch.randn(shape)
    with torch.no_grad():
        expected = network(images)
        found = portable(copy.deepcopy(network), shape)(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax"])
def test_other_models_of_timm(pool):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=5, global_pool=pool).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = portable(copy.deepcopy(network), images.shape)(images)
        torch.testing.assert_close(found, network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "suffix", "usage"),
    [
        (
            "torchscript",
            ".torchscript",
            "tools.predict my_images --checkpoint '{}/a b.torchscript'",
        ),
        pytest.param(
            "opencv",
            ".onnx",
            "next: cv2.dnn.readNetFromONNX('{}/a b.onnx')",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tensorrt",
            ".onnx",
            "trtexec --onnx='{0}/a b.onnx' --saveEngine='{0}/a b'.engine"
            " --minShapes=images:1x3x64x64 --optShapes=images:8x3x64x64 "
            "--maxShapes=images:32x3x64x64",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_command_that_comes_next(tmp_path, capsys, target, suffix, usage):
    more = ANY if target == "tensorrt" else []
    arguments = ["hornet_atto_7x7", *SMALL, "--target", target, *more]
    assert main([*arguments, "--output", str(tmp_path / f"a b{suffix}")]) == 0
    assert capsys.readouterr().out.endswith(usage.format(tmp_path) + "\n")


@pytest.mark.slow
def test_an_onnx_file_for_others(tmp_path):
    onnx = pytest.importorskip("onnx")
    file = exported(tmp_path, "onnx", "hornet_atto_gf")
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()
    graph = onnx.load(file).graph
    constants = {value.name for value in graph.initializer}
    factors = [node.input[0] for node in graph.node if node.op_type == "MatMul"]
    factors = [name for name in factors if name in constants]
    assert len(factors) == 32  # four of each of eight filters
    assert len({*factors}) == 32  # OpenCV 4 refuses one that two products share


@pytest.mark.slow
def test_every_layer_affects_the_logits_of_random_weights():
    network = export.random_classifier("hornet_atto_gf", 64).model
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = network(images)
        for name, parameter in network.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1.5)
            change = (network(images) - before).abs().max() / before.abs().max()
            assert change > export.LARGEST_ERROR["float32"], name
            parameter.copy_(kept)


def test_the_model_is_left_as_it_was(tmp_path):
    classifier = export.random_classifier("hornet_atto_gf", 64)
    before = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    options = Options("bfloat16", folds=False)
    export.export(classifier, tmp_path / "a.torchscript", options)
    after = classifier.model.state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    mixers = [m for m in classifier.model.modules() if isinstance(m, models.GlobalLocalFilter)]
    assert {mixer.impl for mixer in mixers} == {"fft"}


@pytest.mark.parametrize("kind", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_file_says_what_it_is_to_others(tmp_path, kind):
    """Its facts are where each library keeps them, in JSON."""
    torch.manual_seed(0)
    state = {"model": timm.create_model("hornet_atto_7x7", num_classes=2).state_dict()}
    flags = {"model": "hornet_atto_7x7", "input_size": 64, "crop_pct": 0.9}
    torch.save(state | {"args": flags, "classes": ["cat", "dog"]}, tmp_path / "a.pth")
    file = tmp_path / f"a{FORMATS[kind]}"
    assert main(["--checkpoint", str(tmp_path / "a.pth"), "--output", str(file)]) == 0
    if kind == "onnx":
        metadata = pytest.importorskip("onnx").load(file).metadata_props
        text = {item.key: item.value for item in metadata}["hornet"]
    else:
        extra = {"hornet": ""}
        torch.jit.load(file, _extra_files=extra)
        text = extra["hornet"]
    facts = json.loads(text)
    assert facts["model"] == "hornet_atto_7x7"
    assert facts["classes"] == ["cat", "dog"]
    assert (facts["input_size"], facts["crop_pct"]) == (64, 0.9)
    assert facts["mean"] == [0.485, 0.456, 0.406]
    assert facts["std"] == [0.229, 0.224, 0.225]
    assert load_classifier(str(file)).classes == ["cat", "dog"]


@pytest.mark.slow
def test_int8_with_its_accuracy(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    write_drawings(tmp_path / "images", 10)
    torch.manual_seed(0)
    network = timm.create_model("hornet_atto_gf", num_classes=3, layer_scale_init_value=0.5)
    with torch.no_grad():
        network.head.weight.mul_(20)  # answers that rounding alone does not turn
    flags = {"model": "hornet_atto_gf", "input_size": 64}
    state = {"model": network.state_dict(), "args": flags, "classes": list(SHAPES)}
    torch.save(state, tmp_path / "a.pth")
    file = tmp_path / "a.onnx"
    command = ["--checkpoint", str(tmp_path / "a.pth"), "--output", str(file)]
    assert main([*command, *INT8, str(tmp_path / "images"), "--dynamic", "batch"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    images = [path for path in sorted((tmp_path / "images").rglob("*.png"))]
    held_out = quantize.split(tmp_path / "images", Decoding())[1]
    assert len(images) == 2 * len(held_out) == 30
    # what it says is what tools.predict finds, before and after
    shares, found = [], []
    for checkpoint in (tmp_path / "a.pth", file):
        answers = predictions(load_classifier(str(checkpoint)), held_out, torch.device("cpu"), 1, 7)
        found.append([one.classes[0][0] for one in answers])
        right = [path.parent.name == name for path, name in zip(held_out, found[-1], strict=True)]
        shares.append(sum(right) / len(right))
    assert first.startswith(f"15 images not used for calibration: accuracy {shares[0]:.2%} before")
    assert f"{shares[1]:.2%} after" in first
    same = sum(a == b for a, b in zip(*found, strict=True)) / 15
    assert f"the same predictions for {same:.2%}" in first
    assert same > 0.8
    graph = onnx.load(file).graph
    assert [node.op_type for node in graph.node].count("QuantizeLinear") > 50
    weights = [onnx.numpy_helper.to_array(one) for one in graph.initializer
               if one.name.endswith("weight_quantized") and len(one.dims) > 1]  # fmt: skip
    assert len(weights) > 30
    # 255 * 64 * 2 is the largest sum of two products that fits 16 bits, as CPUs without VNNI need
    assert {int(abs(weight.astype(int)).max()) for weight in weights} <= {63, 64}
    assert file.stat().st_size < 0.35 * (tmp_path / "a.pth").stat().st_size
    # without folders that name classes there is no accuracy, and that is said
    for index, path in enumerate(images):
        path.rename(tmp_path / "images" / f"{index}.png")
    assert main([*command, *INT8, str(tmp_path / "images")]) == 0
    assert "accuracy unknown" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", FORMATS.values())
def test_a_damaged_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".mlpackage":
        message = f"{path}: this project runs no Core ML files; Xcode does"
    else:
        for file in (path, *companions(path)):
            with pytest.raises(UserError, match=rf"^there is no file {file}: (give|.* needs it)"):
                Exported(path)
            file.write_bytes(b"nothing of use")
        message = rf"^{path} is damaged, or not a file of tools\.export: ."
    with pytest.raises(UserError) as error:
        Exported(path)
    if isinstance(error.value, MissingPackageError):
        pytest.skip(str(error.value))
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "extra"), [("onnx", "export"), ("openvino", "export,openvino"), ("ncnn", "ncnn")]
)
def test_a_package_that_is_missing(kind, extra):
    needs = rf"a\.x needs .*: pip install '\.\[{extra}\]'"
    with pytest.raises(MissingPackageError, match=needs), quiet_library("a.x", kind):
        raise ImportError("No module named 'x'")


def test_numbers_that_are_not_finite(tmp_path):
    file = exported(tmp_path, "torchscript", "hornet_atto_7x7")
    with pytest.raises(UserError, match=f"{file} gives numbers that are not finite"):
        Exported(file)(torch.full((1, 3, 64, 64), math.nan))
