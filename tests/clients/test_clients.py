"""Files of tools.export in the programs that they are for, each by its own interface.

`make test-clients` installs these programs; a test is skipped if its program is missing.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from inference.export import LARGEST_ERROR
from tests.clients.conftest import PLACE, SIDE, error

pytestmark = pytest.mark.slow
LIMIT = LARGEST_ERROR["float32"]


def metadata(file):
    return json.loads(file.with_name(f"{file.name}.json").read_text())


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("more", [[], ["--batch-size", 2], ["--opset", 20]], ids=str)
def test_opencv(exported, expected, tmp_path, version, more):
    folder = PLACE / f"opencv{version}"
    if not folder.is_dir():
        pytest.skip(f"no OpenCV {version} in {folder}")
    file = exported("opencv", ".onnx", *more)
    images, logits = expected
    count = 2 if "--batch-size" in more else 1
    np.save(tmp_path / "images.npy", images[:count].numpy())
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
    assert error(np.load(tmp_path / "logits.npy"), logits[:count]) < LIMIT


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


@pytest.mark.parametrize("accelerated", [False, True])
def test_torchao(model, expected, accelerated):
    torchao = pytest.importorskip("torchao.quantization")
    import models
    from inference import export

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


def test_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    import timm

    import models  # noqa: F401 - registers the models
    from tools.convert import main

    network = timm.create_model(model, num_classes=10, layer_scale_init_value=0.5).eval()
    flags = {"model": model, "input_size": SIDE, "data_set": "digits"}
    classes = [str(digit) for digit in range(10)]
    checkpoint = {"model": network.state_dict(), "args": flags, "classes": classes}
    torch.save(checkpoint, tmp_path / "a.pth")
    folder = str(tmp_path / "mine")
    assert main([str(tmp_path / "a.pth"), folder]) == 0
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        found = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert list(found.config.id2label.values()) == classes
        assert error(found(images).logits, network(images)) < 1e-5
        backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{folder}").eval()
        (features,) = backbone(images).feature_maps
        assert error(features, network.forward_features(images)) < 1e-5
