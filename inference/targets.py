"""What each runtime takes; docs/deploy.md shows with which versions this was seen."""

from dataclasses import dataclass

OPSETS = range(13, 24)
"""Versions of ONNX's operators that torch.onnx and ONNX Runtime have been seen to work with."""


@dataclass(frozen=True)
class Options:
    """Options of an export."""

    dtype: str = "float32"  # of the computation, or int8
    batch_size: int | None = 1  # images per run; None for any number
    any_size: bool = False  # allow images of any height and width
    folds: bool = True  # fold norms and scales into neighbouring layers
    opset: int = 20  # version of ONNX's operators
    symmetric: bool = False  # int8 with zero points of 0 only, and biases in float32


@dataclass(frozen=True)
class Target:
    """A runtime, or a format that several runtimes read."""

    format: str
    usage: str
    """The command that comes next, or what to do; with {file} and {stem} for a shell, or {path}."""
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    opsets: tuple[int, ...] = ()
    """The first one is the default; empty for formats other than ONNX."""
    dynamic: tuple[str, ...] = ("batch", "size")
    one_image: bool = False
    """Whether it takes one image at a time."""
    symmetric: bool = False
    """Whether int8 has no zero points other than 0."""
    usage_dynamic: str = ""
    """What the command needs further for --dynamic, with {image}: channels x height x width."""


_ANY_OPSET = (20, *(version for version in OPSETS if version != 20))
_PREDICT = "python -m tools.predict my_images --checkpoint {file}"
TARGETS = {
    "onnxruntime": Target(
        "onnx", _PREDICT, ("float32", "float16", "int8"), _ANY_OPSET
    ),
    "openvino": Target("openvino", _PREDICT, opsets=_ANY_OPSET),
    "torchscript": Target("torchscript", _PREDICT),
    "exported": Target("exported", _PREDICT),
    # OpenCV crashes on opsets 18 and 19; dynamic shapes give wrong logits in version 4
    "opencv": Target("onnx", 'cv2.dnn.readNetFromONNX({path!r})', ("float32",), (17, 20), ()),
    "tensorrt": Target(
        "onnx",
        "trtexec --onnx={file} --saveEngine={stem}.engine",
        ("float32", "float16", "int8"),
        (17, 20),
        ("batch",),
        symmetric=True,
        usage_dynamic=" --minShapes=images:1x{image} --optShapes=images:8x{image}"
        " --maxShapes=images:32x{image}",
    ),
    "mnn": Target(
        "onnx",
        "PIP_NO_INDEX=1 mnnconvert -f ONNX --bizCode hornet --modelFile {file}"
        " --MNNModel {stem}.mnn",
        ("float32",),
        (17, 20),
        (),
    ),
    "web": Target(
        "onnx", "npm install --prefix examples/web && python -m http.server --directory "
        "examples/web; the page takes {path}", ("float32", "float16", "int8"),
        (20, 17), (), one_image=True,
    ),
    "litert": Target("litert", _PREDICT, ("float32",), dynamic=()),
    "executorch": Target("executorch", _PREDICT, ("float32",), dynamic=()),
    "ncnn": Target("ncnn", _PREDICT, ("float32", "float16"), dynamic=(), one_image=True),
    "coreml": Target(
        "coreml", "add {path} to a project of Xcode", ("float32", "float16"), dynamic=()
    ),
}  # fmt: skip
"""Without --target, a file is for the first target of its format."""
