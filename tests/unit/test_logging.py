"""log.txt read back, curves drawn, TensorBoard folder refused."""

import json

import pytest
from PIL import Image

from runtime.errors import UserError
from runtime.logging import TensorBoard, plot_curves, read_log


def test_log_is_read_in_order_with_the_last_record_of_a_repeated_epoch(tmp_path):
    lines = [
        {"epoch": e, "train_loss": loss, "train_lr": 1, "train_min_lr": 1}
        for e, loss in ((0, 3.0), (1, 9.0), (1, 2.0))
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"epoch": 2, "tra'
    (tmp_path / "log.txt").write_text(text)
    assert read_log(tmp_path) == [lines[0], lines[2]]
    assert plot_curves(tmp_path) == tmp_path / "curves.png"
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


def test_unwritable_log_dir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--log_dir"):
        TensorBoard(str(tmp_path / "file" / "events"), is_main=True)
    TensorBoard(str(tmp_path / "file" / "events"), is_main=False).write({"a": 1.0}, 0)
