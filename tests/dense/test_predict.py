"""predict of both trees, and the names of what test and predict write."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.registry import init_default_scope
from mmseg.apis import inference_model
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from dense import run
from dense.configs import read_config
from dense.outputs import names_below, names_of, number_names, save_mask, without_suffix
from dense.predict import Detections, main
from dense.shapes import SHAPES, write_masks
from tests.dense.test_run import SEGMENTOR, small

DETECTOR = "configs/finetune/mask_rcnn_own_data.py"
OWN_SEGMENTOR = "configs/finetune/upernet_own_data.py"
OWN_CLASSES = ("ground", *SHAPES)
PALETTE = [[0, 0, 0], [220, 60, 60], [60, 180, 75], [60, 90, 220]]


def untrained(path, folder):
    """The model of a config with random weights, and the weights as a file."""
    config = read_config(path)
    init_default_scope(config.default_scope)
    torch.manual_seed(1)
    model = MODELS.build(config.model).eval()
    model.init_weights()
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / "w.pth")
    return model, str(folder / "w.pth")


def make(name, folder, **changes):
    """A small config and weights for it; the weights do not depend on the data."""
    path = small(name, folder, **changes)
    return path, *untrained(path, folder)


def labels_of(model, config, file):
    """The labels that mmseg's own inference gives."""
    model.cfg = read_config(config)
    model.cfg.test_pipeline = model.cfg.test_dataloader.dataset.pipeline
    return inference_model(model, str(file)).seg_logits.data.argmax(0).numpy()


def agree(mask, labels):
    """Whether they are equal but for a few pixels at which two classes are equally likely."""
    return mask.shape == labels.shape and (mask == labels).mean() > 0.999


def predict(task, *argv):
    return main(task, [str(word) for word in argv])


def fails(capsys, task, *argv):
    """The one line in which a command ends."""
    assert predict(task, *argv) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{task}.predict: error: ")
    return line


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def images(tmp_path):
    """Four different images of two base names, a damaged one, and a file that is no image."""
    drawn = write_masks(tmp_path / "drawn", 4) / "images"
    folder = tmp_path / "images"
    for number, name in enumerate(["a/shot.jpg", "b/shot.jpg", "b/shot.png", "b/c/shot.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(drawn / f"000{number}.jpg").save(folder / name)
    (folder / "b" / "broken.jpg").write_text("text")
    (folder / "notes.txt").write_text("text")
    return folder


def test_masks_are_the_models(tmp_path, images, capsys):
    config, model, weights = make(OWN_SEGMENTOR, tmp_path)
    out = ["--out", tmp_path / "out", "--show-dir", tmp_path / "shown"]
    assert predict("semantic_segmentation", config, weights, images, *out) == 0
    told = capsys.readouterr()
    assert f"skipped: image {images / 'b/broken.jpg'} cannot be used" in told.err
    assert "notes.txt" not in told.err
    expected = {
        "a/shot.png": "a/shot.jpg",
        "b/c/shot.png": "b/c/shot.jpg",
        "b/shot.jpg.png": "b/shot.jpg",
        "b/shot.png.png": "b/shot.png",
    }
    assert files_in(tmp_path / "out") == files_in(tmp_path / "shown") == sorted(expected)
    seen = []
    for name, image in expected.items():
        with Image.open(tmp_path / "out" / name) as file:
            assert file.mode == "P"
            assert file.getpalette()[:12] == sum(PALETTE, [])
            mask = np.array(file)
        labels = labels_of(model, config, images / image)
        assert agree(mask, labels)
        shares = np.bincount(mask.ravel()) / mask.size
        (line,) = [line for line in told.out.splitlines() if f"{images / image}  " in line]
        assert f"  {shares.max():.1%} {OWN_CLASSES[shares.argmax()]}" in line
        assert line.count("%") == np.count_nonzero(shares)
        # mmseg lays 0.8 of the color over the image; its labels cover some pixels
        picture = np.array(Image.open(tmp_path / "shown" / name)).astype(float)
        below = np.array(Image.open(images / image).convert("RGB"))
        ideal = 0.2 * below + 0.8 * np.array(PALETTE)[mask]
        assert (np.abs(picture - ideal).max(-1) < 4).mean() > 0.7
        seen.append(mask)
    assert len({mask.tobytes() for mask in seen}) == 4  # so that mixed-up files are noticed


def test_values_where_zero_is_no_class(tmp_path):
    config, model, weights = make(SEGMENTOR.format("7x7"), tmp_path)
    images = tmp_path / "work-smoke/drawn-0/test/images"
    assert predict("semantic_segmentation", config, weights, images, "--out", tmp_path / "out") == 0
    test = [config, weights, "--work-dir", tmp_path / "t", "--out", tmp_path / "tested"]
    assert run.main("semantic_segmentation", "test", [str(word) for word in test]) == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "tested") == ["0000.png", "0001.png"]
    for name in ("0000", "0001"):
        labels = labels_of(model, config, images / f"{name}.jpg")
        assert agree(np.array(Image.open(tmp_path / f"tested/{name}.png")), labels + 1)
        with Image.open(tmp_path / f"out/{name}.png") as file:
            assert agree(np.array(file), labels + 1)
            assert file.getpalette()[:6] == [0, 0, 0, 120, 120, 120]  # ADE20K's first, wall


def test_detections_are_those_of_test(tmp_path, capsys):
    config, _, weights = make(DETECTOR, tmp_path)
    data = tmp_path / "work-smoke/drawn-0/test"
    prefix = f"test_evaluator.outfile_prefix={tmp_path / 'tested'}"
    test = [config, weights, "--work-dir", tmp_path / "t", "--cfg-options", prefix]
    assert run.main("object_detection", "test", [str(word) for word in test]) == 0
    capsys.readouterr()
    out = ["--out", tmp_path / "new/results.json", "--show-dir", tmp_path / "shown"]
    images = data / "images"
    assert predict("object_detection", config, weights, images, *out, "--score-thr", "0.4") == 0
    found = json.loads((tmp_path / "new/results.json").read_text())
    truth = json.loads((data / "annotations.json").read_text())
    numbers = {image["file_name"]: image["id"] for image in truth["images"]}
    boxes, masks = (
        json.loads((tmp_path / f"tested.{kind}.json").read_text()) for kind in ("bbox", "segm")
    )
    assert len(found) == len(boxes) == len(masks) > 0
    for ours, box, mask in zip(found, boxes, masks, strict=True):
        assert numbers[ours["file_name"]] == box["image_id"]
        assert SHAPES.index(ours["category"]) + 1 == ours["category_id"] == box["category_id"]
        assert ours["bbox"] == pytest.approx(box["bbox"], abs=1e-3)
        assert ours["score"] == pytest.approx(box["score"], abs=1e-5)
        assert ours["segmentation"] == mask["segmentation"]
    assert {ours["image_id"] for ours in found} == {1, 2}
    assert files_in(tmp_path / "shown") == ["0000.png", "0001.png"]
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, ("0000", "0001"), strict=True):
        drawn = [r for r in found if r["file_name"] == f"{name}.jpg" and r["score"] > 0.4]
        counted = sum(int(word) for word in line.split("  ")[1].split() if word.isdigit())
        assert counted == len(drawn)
        image = np.array(Image.open(images / f"{name}.jpg"))
        picture = np.array(Image.open(tmp_path / f"shown/{name}.png"))
        assert picture.shape == image.shape  # no truth beside it
        assert (picture == image).all() == (not drawn)


def test_ids_of_coco():
    """The 80 classes have the ids of COCO's files, which go up to 90."""
    flags = SimpleNamespace(out=None, show_dir=None, score_thr=0.3)
    detections = Detections(CocoDataset.METAINFO, flags)
    ids = dict(zip(detections.names, detections.ids, strict=True))
    known = {"person": 1, "fire hydrant": 11, "stop sign": 13, "elephant": 22, "zebra": 24}
    known |= {"backpack": 27, "handbag": 31, "wine glass": 46, "dining table": 67, "toilet": 70}
    known |= {"tv": 72, "refrigerator": 82, "book": 84, "toothbrush": 90}
    assert {name: ids[name] for name in known} == known
    assert Detections({"classes": ("person", "tv")}, flags).ids == [1, 2]


def test_labels_above_255(tmp_path):
    labels = np.array([[0, 255], [256, 300]])
    for skips_zero in (False, True):
        save_mask(labels, tmp_path / "mask.png", skips_zero, PALETTE)
        with Image.open(tmp_path / "mask.png") as image:
            assert (np.array(image) == labels + skips_zero).all()


def test_names_of_outputs():
    files = ["/d/x/a.jpg", "/d/x/a.png", "/d/y/a.jpg", "/d/y/z/a.jpg"]
    names = names_below(files)
    assert [*names.values()] == ["x/a.jpg", "x/a.png", "y/a.jpg", "y/z/a.jpg"]
    assert [*without_suffix(names).values()] == ["x/a.jpg", "x/a.png", "y/a", "y/z/a"]
    assert names_below(["/d/x/a.jpg"]) == {"/d/x/a.jpg": "a.jpg"}
    assert names_below(["/d/x/a.jpg"], ["/d"]) == {"/d/x/a.jpg": "x/a.jpg"}
    assert names_below(["/d/x/a.jpg", "/e/b.jpg"], ["/d/x"])["/e/b.jpg"] == "e/b.jpg"
    assert names_below([]) == {}
    # "a.jpg" is both the whole name of one and the stem of another
    tricky = {name: name for name in ("a.jpg", "a.png", "a.jpg.tif")}
    assert without_suffix(tricky) == tricky


class Listed:
    """A data set that has only what names are made of."""

    def __init__(self, files, **prefix):
        self.files, self.data_prefix = files, prefix

    def __len__(self):
        return len(self.files)

    def get_data_info(self, index):
        return {"img_path": self.files[index]}


def test_names_of_data_sets():
    one = Listed(["/d/one/a/1.jpg"], img_path="/d/one")
    assert names_of(one) == {"/d/one/a/1.jpg": "a/1.jpg"}
    two = Listed(["/d/two/1.jpg"], img="/d/two/")
    both = Listed(one.files + two.files)
    both.datasets = [one, two]
    assert names_of(both) == {"/d/one/a/1.jpg": "one/a/1.jpg", "/d/two/1.jpg": "two/1.jpg"}
    repeated = Listed(one.files)
    repeated.dataset = one
    assert names_of(repeated) == names_of(one)
    assert names_of(Listed(["/d/1.jpg"], img="")) == {"/d/1.jpg": "1.jpg"}


@pytest.mark.parametrize(
    ("kind", "drawn", "legend"),
    [
        (DetLocalVisualizer, ["disc", r"\$a_b\$", "caf\xe9", "#3"], "#3\t\u732b\n"),
        (SegLocalVisualizer, ["disc", "$a_b$", "#2", "#3"], "#2\tcaf\xe9\n#3\t\u732b\n"),
    ],
)
def test_class_names_without_glyphs(tmp_path, kind, drawn, legend):
    visualizer = kind()
    visualizer.dataset_meta = {"classes": ("disc", "square"), "palette": PALETTE}
    number_names(visualizer, tmp_path / "none")
    assert visualizer.dataset_meta["classes"] == ["disc", "square"]
    assert not (tmp_path / "none").exists()
    names = ("disc", "$a_b$", "caf\xe9", "\u732b")
    visualizer.dataset_meta = {"classes": names, "palette": PALETTE}
    number_names(visualizer, tmp_path)
    assert visualizer.dataset_meta == {"classes": drawn, "palette": PALETTE}
    assert (tmp_path / "classes.txt").read_text(encoding="utf-8") == legend


def test_any_names_in_pictures(tmp_path, images, recwarn, capsysbinary):
    """Class and file names that no font has, and file names that are not UTF-8."""
    byte = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(images / "a/shot.jpg", images / byte)
    for name, task, suffix in (
        (DETECTOR, "object_detection", "/r.json"),
        (OWN_SEGMENTOR, "semantic_segmentation", "/masks"),
    ):
        folder = tmp_path / task
        folder.mkdir()
        names = ("\u732b", "$a_b$", "<i>", "d")[: 3 if task == "object_detection" else 4]
        config, _, weights = make(
            name, folder, **{"test_dataloader.dataset.metainfo.classes": names}
        )
        shown = folder / "shown"
        out = ["--show-dir", shown, "--out", f"{folder}{suffix}"]
        assert predict(task, config, weights, images, *out) == 0
        assert (shown / "classes.txt").read_text(encoding="utf-8") == "#0\t\u732b\n"
        stem = byte.removesuffix(".jpg")
        assert np.array(Image.open(shown / f"{stem}.png")).shape == (96, 96, 3)
        assert capsysbinary.readouterr().out.count(bytes(images)) == 5
    assert "Glyph" not in " ".join(str(warning.message) for warning in recwarn)
    found = json.loads((tmp_path / "object_detection/r.json").read_text())
    assert r"caf\xe9.jpg" in {result["file_name"] for result in found}
    assert (tmp_path / f"semantic_segmentation/masks/{stem}.png").exists()


def test_test_keeps_the_folders_of_masks(tmp_path):
    config, model, weights = make(OWN_SEGMENTOR, tmp_path)
    data = tmp_path / "work-smoke/drawn-0/test"
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        for number, name in enumerate("ab"):
            (data / kind / name).mkdir()
            (data / f"{kind}/000{number}.{suffix}").rename(data / f"{kind}/{name}/shot.{suffix}")
    test = [config, weights, "--work-dir", tmp_path / "t", "--out", tmp_path / "out"]
    assert run.main("semantic_segmentation", "test", [str(word) for word in test]) == 0
    assert files_in(tmp_path / "out") == ["a/shot.png", "b/shot.png"]
    masks = []
    for name in "ab":
        with Image.open(tmp_path / f"out/{name}/shot.png") as file:
            assert file.mode == "L"  # values are read by any program
            masks.append(np.array(file))
        assert agree(masks[-1], labels_of(model, config, data / f"images/{name}/shot.jpg"))
    assert (masks[0] != masks[1]).any()


def test_test_keeps_the_folders_of_pictures(tmp_path):
    config, _, weights = make(DETECTOR, tmp_path)
    data = tmp_path / "work-smoke/drawn-0/test"
    content = json.loads((data / "annotations.json").read_text())
    for entry, name in zip(content["images"], "ab", strict=True):
        (data / "images" / name).mkdir()
        (data / "images" / entry["file_name"]).rename(data / f"images/{name}/shot.jpg")
        entry["file_name"] = f"{name}/shot.jpg"
    (data / "annotations.json").write_text(json.dumps(content))
    test = [config, weights, "--work-dir", tmp_path / "t", "--show-dir", tmp_path / "shown"]
    assert run.main("object_detection", "test", [str(word) for word in test]) == 0
    assert files_in(tmp_path / "shown") == ["a/shot.jpg", "b/shot.jpg"]
    for name in "ab":  # the truth is on the left, the predictions on the right
        picture = np.array(Image.open(tmp_path / f"shown/{name}/shot.jpg")).astype(int)
        image = np.array(Image.open(data / f"images/{name}/shot.jpg")).astype(int)
        assert picture.shape == (96, 192, 3)
        difference = np.abs(picture[:, 96:] - image).mean()
        other = "b" if name == "a" else "a"
        image = np.array(Image.open(data / f"images/{other}/shot.jpg")).astype(int)
        assert difference < np.abs(picture[:, 96:] - image).mean()


def test_mistakes_are_one_line(tmp_path, images, capsys):
    config, _, weights = make(OWN_SEGMENTOR, tmp_path)
    task, image = "semantic_segmentation", images / "a/shot.jpg"
    assert "give a name that ends in .json" in fails(
        capsys, "object_detection", config, weights, image, "--out", "x"
    )
    assert f"config {config} is not of object_detection" in fails(
        capsys, "object_detection", config, weights, image
    )
    both = ["--out", tmp_path / "o", "--show-dir", tmp_path / "x/../o"]
    assert "are one folder" in fails(capsys, task, config, weights, image, *both)
    inside = images / "b/shot.png"
    before = inside.read_bytes()
    line = fails(capsys, task, config, weights, inside, "--out", images / "b")
    assert f"would overwrite the image {inside}" in line
    assert inside.read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert "has no images" in fails(capsys, task, config, weights, tmp_path / "empty")
    assert "does not exist" in fails(capsys, task, config, tmp_path / "none.pth", image)
    wider = ["--cfg-options", "model.decode_head.num_classes=5"]
    line = fails(capsys, task, config, weights, image, *wider)
    assert "model.decode_head.num_classes is 5, the test data have 4 classes" in line
    deeper = ["--cfg-options", "model.backbone.depths=[1,1,1,2]"]
    assert "is of another model" in fails(capsys, task, config, weights, image, *deeper)
    assert "settings as NAME=VALUE" in fails(
        capsys, task, config, weights, image, "--cfg-options", "foo"
    )
    blocked = tmp_path / "file/masks"
    (tmp_path / "file").touch()
    assert "file" in fails(capsys, task, config, weights, image, "--out", blocked)
    broken = images / "b/broken.jpg"
    assert predict(task, config, weights, broken) == 1
    assert f"skipped: image {broken} cannot be used" in capsys.readouterr().err
    assert "gone.jpg does not exist" in fails(capsys, task, config, weights, image, "gone.jpg")
