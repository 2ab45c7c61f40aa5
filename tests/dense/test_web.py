"""The page of tools.web for detectors and segmentors, and the pictures that it shows."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from PIL import Image

from dense.configs import read_config
from dense.pictures import SIDE, Artist, Entry
from dense.predict import Predictor
from tests.dense.test_predict import DETECTOR, OWN_SEGMENTOR, make
from tests.integration.test_web import drop, served, shown_picture, titled
from tools import web

RED, BLUE = (255, 0, 0), (0, 0, 255)
METAINFO = {"classes": ("disc", "square"), "palette": [RED, BLUE]}


def artist(is_detector):
    return Artist(SimpleNamespace(metainfo=METAINFO, is_detector=is_detector, color_type="color"))


def test_boxes_and_masks_are_drawn():
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 40, 30], [50, 50, 60, 60], [50, 5, 60, 15]]),
        labels=torch.tensor([1, 0, 0]),
        scores=torch.tensor([0.9, 0.5, 0.2]),
        masks=torch.zeros(3, 64, 64, dtype=torch.bool),
    )
    found.masks[0, 15:25, 20:30] = True
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    picture, legend = artist(True).detections(grey, found, 0.3)
    assert legend == [Entry("square", BLUE, "1"), Entry("disc", RED, "1")]
    assert picture.size == (SIDE, SIDE)
    scale = SIDE // 64
    assert picture.getpixel((40 * scale - 1, 29 * scale)) == BLUE
    assert picture.getpixel((55 * scale, 60 * scale)) == RED
    assert picture.getpixel((25 * scale, 20 * scale)) == (50, 50, 177)
    changed = (np.array(picture) != 100).any(-1)
    changed[10 * scale : 30 * scale + 1, 10 * scale : 40 * scale + 1] = False
    changed[50 * scale : 60 * scale + 1, 50 * scale : 60 * scale + 1] = False
    assert not changed[:, : 50 * scale].any()  # the name of the small box may be wider than it is
    assert not changed[: 50 * scale].any()
    name = np.array(picture)[11 * scale : 12 * scale, 11 * scale : 14 * scale]
    assert (name == BLUE).all(-1).any()  # white letters on the colour of the class
    assert (name == 255).all(-1).any()
    picture, legend = artist(True).detections(grey, found, 0.9)
    assert legend == []
    assert (np.array(picture) == 100).all()


def test_the_most_certain_is_on_top():
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 40, 30]] * 2),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.5]),
        masks=torch.ones(2, 64, 64, dtype=torch.bool),
    )
    picture, _ = artist(True).detections(Image.new("RGB", (64, 64)), found, 0.3)
    scale = SIDE // 64
    assert picture.getpixel((40 * scale - 1, 29 * scale)) == RED
    red, _, blue = picture.getpixel((5 * scale, 5 * scale))
    assert red > blue


def test_more_classes_than_colours_of_the_data_set():
    names = tuple(f"class {number}" for number in range(100))
    metainfo = {"classes": names, "palette": [RED] * 80}
    shown = SimpleNamespace(metainfo=metainfo, is_detector=True, color_type="color")
    assert len(Artist(shown).colors) == 100


def test_colours_of_classes_are_laid_over_the_image():
    labels = np.zeros((20, 40), int)
    labels[:, 30:] = 1
    picture, legend = artist(False).classes(Image.new("RGB", (40, 20)), labels)
    assert legend == [Entry("disc", RED, "75.0%"), Entry("square", BLUE, "25.0%")]
    assert picture.size == (SIDE, SIDE // 2)
    pixels = np.array(picture)
    assert (pixels[:, : 3 * SIDE // 4] == (127, 0, 0)).all()
    assert (pixels[:, 3 * SIDE // 4 :] == (0, 0, 127)).all()


@pytest.mark.parametrize(
    ("name", "classes"), [(DETECTOR, 3), (OWN_SEGMENTOR, 4)], ids=["detector", "segmentor"]
)
def test_an_image_dropped_on_the_page(tab, tmp_path, name, classes):
    pytest.importorskip("gradio")
    config, _, weights = make(name, tmp_path)
    file = tmp_path / "work-smoke/drawn-0/test/images/0000.jpg"
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    with served(uploads, "--checkpoint", weights, "--config", config) as address:
        tab.goto(address)
        titled(tab, f"small, {classes} classes · w.pth")
        tab.locator(".gallery-item").nth(1).wait_for()  # the test images of the config
        drop(tab, file)
        drawn = Artist(Predictor(read_config(config), weights))
        picture, legend = drawn(str(file), 0.3)
        np.testing.assert_array_equal(shown_picture(tab, "what it finds"), picture)
        for entry in legend:
            assert tab.get_by_text(f"{entry.name}\xa0{entry.amount}").is_visible()
        plain = Image.open(file).resize(picture.size, Image.Resampling.NEAREST)
        assert (np.array(picture) != np.array(plain)).any(-1).mean() > 0.01
        if drawn.is_detector:
            tab.get_by_label("number input for lowest score").fill("1")
            tab.get_by_text("nothing", exact=True).wait_for(timeout=20_000)
            np.testing.assert_array_equal(shown_picture(tab, "what it finds"), plain)
        tab.reload()
        broken = tmp_path / "broken.jpg"
        broken.write_text("text")
        drop(tab, broken)
        tab.get_by_text("image broken.jpg cannot be used").wait_for(timeout=20_000)
        assert tab.mistakes == []


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    config, _, weights = make(DETECTOR, tmp_path)
    other = tmp_path / "classifier.pth"
    torch.save({"model": {"head.bias": torch.zeros(3)}}, other)

    def told(*flags):
        assert web.main(["--checkpoint", *map(str, flags)]) == 1
        line = capsys.readouterr().err
        assert line.startswith("tools.web: error: ")
        assert line.count("\n") == 1
        return line

    assert "is of a detector or segmentor: use object_detection.predict" in told(weights)
    assert "config nowhere.py does not exist" in told(weights, "--config", "nowhere.py")
    assert "--config: its model has no --model" in told(weights, "--config", config, "--ema")
    assert f"checkpoint {other}" in told(other, "--config", config)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    assert "run `make dense` once" in told(weights, "--config", config)
