"""Files of tools.export in the programs that they are for, each by its own interface.

`make test-clients` installs these programs; a test is skipped if its program is missing.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import timm
import torch

import models
from inference import export
from inference.export import LARGEST_ERROR
from inference.exported import Exported, facts_file
from inference.targets import Options
from runtime.errors import UserError
from tests.clients.conftest import PLACE, SIDE, error
from tools import convert
from tools.export import main

pytestmark = pytest.mark.slow
LIMIT = LARGEST_ERROR["float32"]


def metadata(file):
    return json.loads(file.with_name(f"{file.name}.json").read_text())


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("more", [[], ["--batch-size", 2], ["--opset", 20]], ids=str)
def test_opencv(exported, expected, tmp_path, version, more):
    file = exported("opencv", ".onnx", *more)
    opset = onnx.load(file).opset_import[0].version
    assert opset == (20 if "--opset" in more else 17)
    images, logits = expected
    count = 2 if "--batch-size" in more else 1
    assert error(by_opencv(version, file, images[:count]), logits[:count]) < LIMIT


@pytest.mark.parametrize("version", [4, 5])
def test_opencv_at_32_pixels(tmp_path, version):
    """Where the last stage has maps of one pixel."""
    arguments = ["hornet_atto_gf", "--input-size", "32", "--target", "opencv"]
    assert main([*arguments, "--output", str(tmp_path / "mine.onnx")]) == 0
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        logits = export.random_classifier("hornet_atto_gf", 32).model(images)
    assert error(by_opencv(version, tmp_path / "mine.onnx", images), logits) < LIMIT


def by_opencv(version, file, images):
    folder = PLACE / f"opencv{version}"
    if not folder.is_dir():
        pytest.skip(f"no OpenCV {version} in {folder}")
    np.save(file.with_name("images.npy"), images.numpy())
    program = (
        "import cv2, numpy as np, sys\n"
        f"assert cv2.__version__.startswith('{version}.'), cv2.__version__\n"
        "net = cv2.dnn.readNetFromONNX('mine.onnx')\n"
        "net.setInput(np.load('images.npy'))\n"
        "np.save('logits.npy', net.forward())\n"
    )
    # OpenCV may end its process
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=file.parent, env=environment, check=True, timeout=100)
    return np.load(file.with_name("logits.npy"))


def test_litert(exported, expected):
    pytest.importorskip("litert_torch")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    file = exported("litert", ".tflite")
    runner = interpreter.Interpreter(str(file)).get_signature_runner("serving_default")
    images, logits = expected
    (found,) = runner(images=images[:1].numpy()).values()
    assert error(found, logits[:1]) < LIMIT
    assert metadata(file)["input_size"] == SIDE


def test_executorch(exported, expected):
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    file = exported("executorch", ".pte")
    method = Runtime.get().load_program(file).load_method("forward")
    images, logits = expected
    (found,) = method.execute([images[:1].contiguous()])
    assert error(found, logits[:1]) < LIMIT
    assert metadata(file)["input_size"] == SIDE
    assert b"aten::convolution" not in file.read_bytes()  # XNNPACK runs them all


def test_executorch_from_channels_last(tmp_path):
    pytest.importorskip("executorch")
    classifier = export.random_classifier("hornet_atto_7x7", SIDE)
    classifier.model.to(memory_format=torch.channels_last)
    assert export.export(classifier, tmp_path / "a.pte", Options())


def by_ncnn(file, image, dtype="float32"):
    ncnn = pytest.importorskip("ncnn")
    network = ncnn.Net()
    network.opt.use_fp16_packed = network.opt.use_fp16_storage = dtype == "float16"
    network.opt.use_fp16_arithmetic = network.opt.use_bf16_storage = False
    assert network.load_param(str(file)) == 0
    assert network.load_model(str(file.with_suffix(".bin"))) == 0
    extractor = network.create_extractor()
    extractor.input("in0", ncnn.Mat(image.numpy()).clone())
    _, found = extractor.extract("out0")
    return np.array(found)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ncnn(exported, expected, dtype):
    pytest.importorskip("pnnx")
    file = exported("ncnn", ".ncnn.param", "--dtype", dtype)
    for image, wanted in zip(*expected, strict=True):
        assert error(by_ncnn(file, image, dtype), wanted) < LARGEST_ERROR[dtype]
    assert metadata(file)["dtype"] == dtype


@pytest.mark.parametrize(
    ("target", "suffix", "package"),
    [
        ("litert", ".tflite", "litert_torch"),
        ("executorch", ".pte", "executorch"),
        ("ncnn", ".ncnn.param", "pnnx"),
    ],
)
def test_a_truncated_file(tmp_path, target, suffix, package):
    pytest.importorskip(package)
    file = tmp_path / f"a{suffix}"
    assert main(["hornet_atto_7x7", "--input-size", "64", "--output", str(file)]) == 0
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{file} is damaged") as found:
        Exported(file)
    assert "\n" not in str(found.value)
    file.write_bytes(content)
    facts_file(file).write_text("{}")
    with pytest.raises(UserError, match=f"{file} is damaged, or not a file of tools.export"):
        Exported(file)


def test_ncnn_at_32_pixels(tmp_path):
    """Where the last stage has maps of one pixel."""
    pytest.importorskip("pnnx")
    file = tmp_path / "a.ncnn.param"
    assert main(["hornet_atto_gf", "--input-size", "32", "--output", str(file)]) == 0
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        logits = export.random_classifier("hornet_atto_gf", 32).model(images)
    assert error(by_ncnn(file, images[0]), logits[0]) < LIMIT


def test_ncnn_from_onnx(exported, expected):
    pnnx = pytest.importorskip("pnnx")
    file = exported("onnxruntime", ".onnx")
    shape = f"inputshape=[1,3,{SIDE},{SIDE}]"
    subprocess.run([pnnx.EXEC_PATH, file, shape, "fp16=0"], cwd=file.parent, check=True)
    images, logits = expected
    assert error(by_ncnn(file.with_name("mine.ncnn.param"), images[0]), logits[0]) < LIMIT


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_coreml_converts(exported, dtype):
    coremltools = pytest.importorskip("coremltools")
    file = exported("coreml", ".mlpackage", "--dtype", dtype)
    model = coremltools.models.MLModel(str(file), skip_model_load=True)
    specification = model.get_spec()
    (image,), (logits,) = specification.description.input, specification.description.output
    assert (image.name, logits.name) == ("images", "logits")
    assert list(image.type.multiArrayType.shape) == [1, 3, SIDE, SIDE]
    assert json.loads(model.user_defined_metadata["hornet"])["dtype"] == dtype


def test_coreml_from_other_formats(exported):
    coremltools = pytest.importorskip("coremltools")
    program = torch.export.load(exported("exported", ".pt2"))
    assert coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS16)
    traced = torch.jit.load(exported("torchscript", ".torchscript"))
    images = coremltools.TensorType(shape=(1, 3, SIDE, SIDE))
    target = coremltools.target.iOS16
    assert coremltools.convert(traced, inputs=[images], minimum_deployment_target=target)


def test_mnn(exported, expected):
    mnn = pytest.importorskip("MNN")
    file = exported("mnn", ".onnx")
    command = f"-f ONNX --modelFile {file} --MNNModel {file.with_suffix('.mnn')} --bizCode hornet"
    # it would install a package that reports its use
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    program = ["-c", "from MNN.tools.mnnconvert import main; main()"]
    subprocess.run([sys.executable, *program, *command.split()], env=environment, check=True)
    network = mnn.nn.load_module_from_file(str(file.with_suffix(".mnn")), ["images"], ["logits"])
    images, logits = expected
    blob = mnn.expr.placeholder([1, 3, SIDE, SIDE], mnn.expr.NCHW)
    blob.write(images[0].flatten().tolist())
    found = mnn.expr.convert(network.forward(blob), mnn.expr.NCHW)
    assert error(np.array(found.read()), logits[:1]) < 1e-3  # its own approximations


def test_tensorrt_by_its_rules(exported, drawings):
    """TensorRT needs a GPU: what can be seen here is the file."""
    onnx = pytest.importorskip("onnx")
    file = exported("tensorrt", ".onnx", "--dynamic", "batch")
    onnx.checker.check_model(file, full_check=True)
    graph = onnx.load(file)
    assert graph.opset_import[0].version == 17
    quantised = onnx.load(
        exported("tensorrt", ".onnx", "--dtype", "int8", "--calibration", drawings)
    )
    assert quantised.opset_import[0].version == 17
    values = {x.name: onnx.numpy_helper.to_array(x) for x in quantised.graph.initializer}
    nodes = quantised.graph.node
    linear = [n for n in nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(linear) > 100
    for node in linear:
        zero = values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    scaled = {n.output[0]: n.input[0] for n in linear}
    for node in nodes:
        if node.op_type == "Conv":
            assert node.input[1] in scaled  # the weights are quantised, biases are not
            assert len(node.input) == 2 or values[node.input[2]].dtype == np.float32
    weights = [values[scaled[node.input[1]]] for node in nodes if node.op_type == "Conv"]
    assert max(int(abs(weight.astype(int)).max()) for weight in weights) == 127  # of 8 bits


@pytest.mark.parametrize("accelerated", [False, True])
def test_torchao(model, expected, accelerated):
    torchao = pytest.importorskip("torchao.quantization")
    network = export.random_classifier(model, SIDE).model
    if accelerated:
        models.accelerate(network)
    torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    images, logits = expected
    with torch.no_grad():
        assert 1e-4 < error(network(images), logits) < 3e-2  # of int8
        # compiled, the matrix products stay
        program = torch.compile(network, backend="aot_eager")
        assert error(program(images), network(images)) < 1e-4


def code_of_deploy(word):
    page = (PLACE.parents[1] / "docs/deploy.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in c]
    return code


def run_in(folder, code):
    environment = os.environ | {"PYTHONPATH": str(PLACE.parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_of_digits(model, tmp_path):
    """A checkpoint where the page has it, and its network."""
    network = timm.create_model(model, num_classes=10, layer_scale_init_value=0.5).eval()
    flags = {"model": model, "input_size": SIDE, "data_set": "digits"}
    state = {"model": network.state_dict(), "args": flags, "classes": list("0123456789")}
    (tmp_path / "runs/mine").mkdir(parents=True)
    torch.save(state, tmp_path / "runs/mine/checkpoint-best.pth")
    torch.save(torch.randn(1, 3, SIDE, SIDE), tmp_path / "images.pt")
    return network


def test_code_for_torchao_runs(run_of_digits, tmp_path):
    pytest.importorskip("torchao")
    code = code_of_deploy("torchao") + (
        "import torch\n"
        "with torch.no_grad():\n"
        "    print(model(torch.load('images.pt'))[0].tolist())\n"
    )
    found = torch.tensor(json.loads(run_in(tmp_path, code).splitlines()[-1]))
    with torch.no_grad():
        wanted = run_of_digits(torch.load(tmp_path / "images.pt"))
    assert 0 < error(found, wanted) < 3e-2


def test_transformers(run_of_digits, tmp_path):
    pytest.importorskip("transformers")
    checkpoint = str(tmp_path / "runs/mine/checkpoint-best.pth")
    assert convert.main([checkpoint, str(tmp_path / "mine")]) == 0
    code = code_of_deploy("transformers") + (
        "import torch\n"
        "images = torch.load('images.pt')\n"
        "print([*model.config.id2label.values()])\n"
        "with torch.no_grad():\n"
        "    found = [model.eval()(images).logits, *backbone.eval()(images).feature_maps]\n"
        "torch.save(found, 'r.pt')\n"
    )
    classes = run_in(tmp_path, code).splitlines()[-1]
    assert classes == str(list("0123456789"))
    logits, *features = torch.load(tmp_path / "r.pt")
    images = torch.load(tmp_path / "images.pt")
    with torch.no_grad():
        assert error(logits, run_of_digits(images)) < 1e-5
        wanted = run_of_digits.forward_intermediates(images, intermediates_only=True)
    assert len(features) == 4
    for found, own in zip(features, wanted, strict=True):
        assert error(found, own) < 1e-5
