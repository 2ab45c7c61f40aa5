"""A frozen HorNet as a feature extractor for a linear classifier of scikit-learn.

python -m examples.linear_probe
"""

import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import models  # noqa: F401 - registers the HorNets with timm


@torch.inference_mode()
def features_of(model: nn.Module, images: Tensor, batch_size: int = 128) -> np.ndarray:
    """Images (N, 3, H, W) -> the pooled features before the head (N, C)."""
    return torch.cat([model(batch) for batch in images.split(batch_size)]).numpy()


def main(weights: str = "") -> float:
    """The accuracy on a quarter of the digits; `weights`: a tag such as hornet_tiny_gf.in1k.

    Without weights the features are those of a random network, which tell digits apart too.
    """
    torch.manual_seed(0)
    model = timm.create_model(weights or "hornet_atto_gf", pretrained=bool(weights), num_classes=0)
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(pixels, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    x = features_of(model.eval(), (images - 0.45) / 0.225)
    x_train, x_test, y_train, y_test = train_test_split(x, digits.target, random_state=0)
    scale = x_train.std()
    probe = LogisticRegression(max_iter=1000).fit(x_train / scale, y_train)
    accuracy = float(probe.score(x_test / scale, y_test))
    sys.stdout.write(f"linear probe on {x.shape[1]} frozen features: accuracy {accuracy:.1%}\n")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
