"""Checkpoints of whole detectors and segmentors: read safely, refused where they do not fit."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from torch import nn

from dense.loading import PlainCheckpoints, check_fit, read, use_safe_readers
from runtime.errors import UserError


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_of_other_runners_are_read_without_the_history(tmp_path):
    hub = MessageHub.get_instance("other")
    for value in (1.0, 2.0):
        hub.update_scalar("train/loss", value)
    hub.update_info("best_score", np.float64(0.5))
    state = {"state_dict": {"w": torch.ones(2)}, "message_hub": hub.state_dict(), "meta": {}}
    torch.save(state, tmp_path / "c.pth")
    found = read(str(tmp_path / "c.pth"))["message_hub"]
    assert found == {
        "log_scalars": {},
        "runtime_info": {"best_score": 0.5},
        "resumed_keys": {"best_score": True},
    }


def test_what_is_saved_is_plain(tmp_path):
    hub = {
        "log_scalars": {"train/loss": HistoryBuffer()},
        "runtime_info": {"best_score": np.float32(0.5), "iter": 3},
        "resumed_keys": {"train/loss": True, "best_score": True, "iter": False},
    }
    state = {"state_dict": {"w": torch.ones(2)}, "message_hub": hub}
    PlainCheckpoints().before_save_checkpoint(None, state)
    torch.save(state, tmp_path / "c.pth")
    found = torch.load(tmp_path / "c.pth", weights_only=True)["message_hub"]
    assert found == {
        "log_scalars": {},
        "runtime_info": {"best_score": 0.5, "iter": 3},
        "resumed_keys": {"best_score": True, "iter": False},
    }
    MessageHub.get_instance("test").load_state_dict(found)
    assert MessageHub.get_instance("test").get_info("best_score") == 0.5


def test_checkpoint_of_the_release(tmp_path):
    meta = {"epoch": 3, "config": "import os", "CLASSES": ("a", "b"), "args": Namespace(lr=0.1)}
    meta["hook_msgs"] = {"best_score": np.float64(0.5), "best_epoch": np.int64(3)}
    torch.save({"state_dict": {"w": torch.ones(2)}, "meta": meta}, tmp_path / "c.pth")
    found = read(str(tmp_path / "c.pth"))
    assert torch.equal(found["state_dict"]["w"], torch.ones(2))
    assert "config" not in found["meta"]  # mmengine would run it
    assert found["meta"]["hook_msgs"] == {"best_score": 0.5, "best_epoch": 3}


@pytest.mark.parametrize("place", ["meta", "state_dict", "message_hub"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, place):
    state = {"state_dict": {"w": torch.ones(2)}, "meta": {}, "message_hub": {}}
    state[place]["x"] = Runs(tmp_path / "touched")
    torch.save(state, tmp_path / "c.pth")
    use_safe_readers()
    with pytest.raises(UserError, match=r"c\.pth cannot be read: it is damaged, or holds more"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "c.pth"))
    for scheme in ("torchvision://resnet50", "mmcls://x", "s3://x", "open-mmlab://x"):
        with pytest.raises(UserError, match="an address that begins with https"):
            CheckpointLoader.load_checkpoint(scheme)
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "c.pth", weights_only=False)
    assert (tmp_path / "touched").exists()  # so that the test can fail


def model():
    return nn.ModuleDict({"backbone": nn.Linear(2, 3), "head": nn.Linear(3, 4)})


def test_what_does_not_fit_is_named():
    weights = model().state_dict()
    check_fit(model(), {"state_dict": weights}, "x.pth", whole=True)
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    check_fit(nn.DataParallel(model()), {"state_dict": prefixed}, "x.pth", whole=True)
    other_head = weights | {"head.weight": torch.ones(5, 3), "head.bias": torch.ones(5)}
    check_fit(model(), {"state_dict": other_head}, "x.pth", whole=False)
    with pytest.raises(UserError, match=r"x\.pth is of another model.*head\.bias \(\[5\] instead"):
        check_fit(model(), {"state_dict": other_head}, "x.pth", whole=True)
    headless = {name: value for name, value in weights.items() if "backbone" not in name}
    for whole in (False, True):  # also names a classifier's checkpoint, given for a whole model
        with pytest.raises(UserError, match="is not of a detector or segmentor"):
            check_fit(model(), {"state_dict": headless}, "x.pth", whole)
    part = headless | {"backbone.bias": weights["backbone.bias"]}
    with pytest.raises(UserError, match=r"lacks backbone\.weight"):
        check_fit(model(), {"state_dict": part}, "x.pth", whole=False)
