"""A frozen HorNet as feature extractor for scikit-learn's logistic regression.

python -m examples.linear_probe
"""

import sys

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import models  # noqa: F401 - registers the HorNets with timm


def main(weights: str = "") -> float:
    """Return the accuracy on a held-out quarter of the digits.

    `weights` is a published name such as hornet_tiny_gf.in1k. Without it the network is random;
    even its features separate digits.
    """
    torch.manual_seed(0)
    model = timm.create_model(weights or "hornet_atto_gf", pretrained=bool(weights), num_classes=0)
    model.eval()
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(pixels, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    images = (images - 0.45) / 0.225
    with torch.inference_mode():  # without a head the model returns pooled features (N, C)
        x = torch.cat([model(batch) for batch in images.split(128)]).numpy()
    x_train, x_test, y_train, y_test = train_test_split(x, digits.target, random_state=0)
    scale = x_train.std()
    probe = LogisticRegression(max_iter=1000).fit(x_train / scale, y_train)
    accuracy = float(probe.score(x_test / scale, y_test))
    sys.stdout.write(f"linear probe on {x.shape[1]} frozen features: accuracy {accuracy:.1%}\n")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
