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
    next: str
    """The command that comes next, or what to do; with {file} and {stem}."""
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    opsets: tuple[int, ...] = ()
    """The first one is the default; empty for formats other than ONNX."""
    dynamic: tuple[str, ...] = ("batch", "size")
    symmetric: bool = False
    """Whether int8 has no zero points other than 0."""


_PREDICT = "python -m tools.predict my_images --checkpoint {file}"
TARGETS = {
    "onnxruntime": Target(
        "onnx", _PREDICT, ("float32", "float16", "int8"), (20, *(o for o in OPSETS if o != 20))
    ),
    "openvino": Target("openvino", _PREDICT, opsets=(20, 17)),
    "torchscript": Target("torchscript", _PREDICT),
    "exported": Target("exported", _PREDICT),
    # OpenCV crashes on opsets 18 and 19; dynamic shapes give wrong logits in version 4
    "opencv": Target("onnx", 'cv2.dnn.readNetFromONNX("{file}")', ("float32",), (17, 20), ()),
    "tensorrt": Target(
        "onnx",
        "trtexec --onnx={file} --saveEngine={stem}.engine",
        ("float32", "float16", "int8"),
        (17, 20),
        ("batch",),
        symmetric=True,
    ),
    "mnn": Target(
        "onnx",
        "mnnconvert -f ONNX --modelFile {file} --MNNModel {stem}.mnn --bizCode hornet",
        ("float32",),
        (17, 20),
        (),
    ),
    "web": Target(
        "onnx", "the page examples/web/ classifies with it", ("float32", "float16", "int8"),
        (20, 17), (),
    ),
    "litert": Target("litert", _PREDICT, ("float32",), dynamic=()),
    "executorch": Target("executorch", _PREDICT, ("float32",), dynamic=()),
    "ncnn": Target("ncnn", _PREDICT, ("float32", "float16"), dynamic=()),
    "coreml": Target(
        "coreml", "add {file} to a project of Xcode", ("float32", "float16"), dynamic=()
    ),
}  # fmt: skip
"""The first of a format is what its files are for if no target is named."""
