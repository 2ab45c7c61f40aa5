"""The losses against torch, timm and their equations; the weights of classes and their files."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy

from config.flags import LossConfig
from input_pipeline.image_sets import ImageSet
from runtime.errors import UserError
from training.loss import build_loss, class_weights_of

CLASSES = ["cat", "dog", "owl"]
torch.manual_seed(0)
LOGITS = torch.randn(6, 3, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 2, 2, 2])
SOFT = torch.randn(6, 3, dtype=torch.float64).softmax(dim=1)
WEIGHTS = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)


def one_hot(smoothing):
    return F.one_hot(LABELS, 3).double() * (1 - smoothing) + smoothing / 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [False, True])
def test_weighted_cross_entropy(smoothing, mixes):
    loss = build_loss(LossConfig(), smoothing, mixes, WEIGHTS)
    soft = SOFT if mixes else one_hot(smoothing)
    terms = -WEIGHTS * soft * LOGITS.log_softmax(dim=1)
    torch.testing.assert_close(loss(LOGITS, SOFT if mixes else LABELS), terms.sum() / 6)
    ones = build_loss(LossConfig(), smoothing, mixes, torch.ones(3, dtype=torch.float64))
    unweighted = build_loss(LossConfig(), smoothing, mixes)
    targets = SOFT if mixes else LABELS
    torch.testing.assert_close(ones(LOGITS, targets), unweighted(LOGITS, targets))


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_is_timms(threshold):
    config = LossConfig(loss="bce", bce_target_thresh=threshold)
    theirs = BinaryCrossEntropy(0.1, threshold)
    for targets in (LABELS, SOFT):
        assert build_loss(config, 0.1, targets is SOFT)(LOGITS, targets) == theirs(LOGITS, targets)
    targets = one_hot(0.1) if threshold is None else one_hot(0)
    terms = WEIGHTS * targets * F.logsigmoid(LOGITS) + (1 - targets) * F.logsigmoid(-LOGITS)
    weighted = build_loss(config, 0.1, False, WEIGHTS)(LOGITS, LABELS)
    torch.testing.assert_close(weighted, -terms.mean())


@pytest.mark.parametrize("mixes", [False, True])
def test_focal_loss(mixes):
    targets = SOFT if mixes else one_hot(0.1)
    loss = build_loss(LossConfig(loss="focal"), 0.1, mixes)(LOGITS, SOFT if mixes else LABELS)
    p = LOGITS.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none")
    wrong = targets * (1 - p) + (1 - targets) * p
    weight = 0.25 * targets + 0.75 * (1 - targets)
    torch.testing.assert_close(loss, (weight * wrong**2 * entropy).mean())
    plain = LossConfig(loss="focal", focal_gamma=0, focal_alpha=-1)
    torch.testing.assert_close(build_loss(plain, 0.1, True)(LOGITS, targets), entropy.mean())


class Labelled(ImageSet):
    def __init__(self, labels):
        super().__init__(labels, None, CLASSES, labels)


def test_balanced_weights_are_those_of_scikit_learn():
    weights = class_weights_of(LossConfig(class_weights="balanced"), Labelled(LABELS), CLASSES)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.tolist())
    torch.testing.assert_close(weights, torch.tensor(expected).float())
    assert weights[LABELS].mean() == pytest.approx(1)
    some = Labelled(torch.tensor([0, 2, 2, 2]))  # no image of class 1
    weights = class_weights_of(LossConfig(class_weights="balanced"), some, CLASSES)
    assert weights[some.labels].mean() == pytest.approx(1)
    with pytest.raises(UserError, match="--class_weights balanced: the labels .* only after"):
        class_weights_of(LossConfig(class_weights="balanced"), Labelled(None), CLASSES)


@pytest.mark.parametrize("content", [[1, 2.5, 0], {"owl": 0, "cat": 1, "dog": 2.5}])
def test_weights_of_a_file(tmp_path, content):
    (tmp_path / "w.json").write_text(json.dumps(content))
    config = LossConfig(class_weights=str(tmp_path / "w.json"))
    assert class_weights_of(config, Labelled(LABELS), CLASSES).tolist() == [1, 2.5, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "2 weights for 3 classes"),
        ("3", "no list for 3 classes"),
        ('{"cat": 1, "dog": 1, "cow": 1}', "only in the file cow, only in the data owl"),
        ("[1, 2, -1]", "weights are numbers of at least 0"),
        ("[0, 0, 0]", "weights are numbers"),
        ('[1, 2, "3"]', "weights are numbers"),
        ("[1, 2, .nan]", "weights are numbers"),
        ("[1, 2, true]", "weights are numbers"),
        ("[1, 2", "not a JSON or YAML file"),
        (b"\xff\xfe\x00", "not a JSON or YAML file"),
        (None, r"cannot be read: No such file or directory; or give balanced"),
    ],
)
def test_wrong_files_of_weights(tmp_path, content, message):
    path = tmp_path / "w.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"--class_weights .*w.json.*{message}"):
        class_weights_of(LossConfig(class_weights=str(path)), Labelled(LABELS), CLASSES)
