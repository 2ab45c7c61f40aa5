"""int8 quantisation for ONNX Runtime, and its effect on the accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.classifier import Classifier
from input_pipeline.folders import find_images
from input_pipeline.images import Decoding, readable_files
from runtime.errors import UserError

CALIBRATION_IMAGES = 128  # most images that give the ranges of the activations


@dataclass(frozen=True)
class Quality:
    """Agreement of two networks on the same images."""

    images: int
    before: float | None  # accuracy; None if the images are not in class folders
    after: float | None
    same: float  # share of images with the same predicted class, or of equal decisions
    error: float  # largest difference of logits, relative to the largest logit

    def __str__(self) -> str:
        accuracy = "unknown"
        if self.before is not None:
            accuracy = f"{self.before:.2%} before, {self.after:.2%} after"
        return (
            f"{self.images} images not used for calibration: accuracy {accuracy}; the same "
            f"predictions for {self.same:.2%}; largest error {self.error:.1e} of the largest logit"
        )


def split(folder: Path, decoding: Decoding) -> tuple[list[Path], list[Path]]:
    """Split a folder's images for calibration and `quality`; UserError if fewer than two.

    Unreadable images are told and left out.
    """
    files = readable_files(find_images([str(folder)]), decoding)
    if len(files) < 2:
        raise UserError(f"--calibration {folder}: give a folder of two images or more")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(CALIBRATION_IMAGES, len(files) // 2)
    return [files[i] for i in order[:count]], [files[i] for i in order[count:]]


def batches(files: list[Path], classifier: Classifier, size: int) -> Iterator[Tensor]:
    """Yield preprocessed images in batches of `size`; the last batch is filled up by repetition."""
    for start in range(0, len(files), size):
        part = files[start : start + size]
        part += (size - len(part)) * part[-1:]
        yield classifier.inputs(part)


def quantize(source: Path, target: Path, images: Iterator[Tensor], symmetric: bool = False) -> None:
    """Write an ONNX file whose convolutions and head compute in int8.

    Weights have a scale per output channel; `images` give the ranges of the activations. Norms,
    gates and Fourier transforms stay in float32. TensorRT takes `symmetric` only: activations in
    int8 with a zero point of 0, and biases in float32. Other weights have 7 bits: on x86 CPUs
    without VNNI, sums of two products with 8 bits exceed their 16 bits and are clipped.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(images, None)
            return None if batch is None else {"images": batch.numpy()}

    quantize_static(
        source,
        target,
        Images(),
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        reduce_range=not symmetric,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": symmetric, "QuantizeBias": not symmetric},
    )


@torch.no_grad()
def quality(classifier: Classifier, after: nn.Module, files: list[Path], size: int) -> Quality:
    """Compare a network with a classifier's; accuracies need images in class folders."""
    every = batches(files, classifier, size)
    logits = [(classifier.model(batch), after(batch)) for batch in every]
    first, second = (torch.cat(parts)[: len(files)] for parts in zip(*logits, strict=True))
    error = float((second - first).abs().max() / first.abs().max())
    labels = [x >= 0 if classifier.multi_label else x.argmax(1) for x in (first, second)]
    same = float((labels[0] == labels[1]).float().mean())
    truth = classifier.truth(files)
    right = [None if truth is None else float((x == truth).float().mean()) for x in labels]
    return Quality(len(files), right[0], right[1], same, error)
