"""Annotations that do not fit: one clear error each, or the right handling."""

import io
import json

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.utils import register_all_modules
from mmengine.dataset import RepeatDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image

import dense.checks
from dense.checks import check
from dense.shapes import SHAPES, write_coco, write_masks
from runtime.errors import UserError


def coco(folder, classes=SHAPES, **options):
    register_all_modules()
    return CocoDataset(
        ann_file=str(folder / "annotations.json"),
        data_prefix={"img": str(folder / "images")},
        metainfo={"classes": classes},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    return write_coco(tmp_path / "coco", 3)


def edit(folder, change):
    path = folder / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_good_annotations_pass(folder):
    dataset = coco(folder)
    check(dataset)
    check(RepeatDataset(dataset, 2))  # a second time, through a wrapper
    assert len(dataset.pipeline.transforms) == 3
    assert dataset[0]["gt_masks"].height == 96


@pytest.fixture
def told(monkeypatch):
    """The warnings of a check, one string that grows."""
    lines = io.StringIO()
    monkeypatch.setattr(dense.checks, "print_log", lambda line, *_: lines.write(line + "\n"))

    class Lines:
        def __contains__(self, text):
            return text in lines.getvalue()

    return Lines()


def test_boxes(folder, told):
    check(coco(folder))
    assert "annotations" not in told
    text = (folder / "annotations.json").read_text()
    count = len(json.loads(text)["annotations"])
    edit(folder, lambda content: content["annotations"][0].update(bbox=[5, 5, -3, 4]))
    check(coco(folder))
    assert f"1 of {count} annotations have a box of less than a pixel" in told
    edit(folder, lambda content: content["annotations"][1].update(bbox=[50, 50, 90, 90]))
    check(coco(folder))
    assert f"1 of {count} annotations reach beyond their image" in told
    edit(folder, lambda content: content["annotations"][1].update(image_id=77))
    with pytest.raises(UserError, match="annotation 2 has the unknown image_id 77"):
        check(coco(folder))
    content = json.loads(text)
    for annotation in content["annotations"]:
        annotation["bbox"] = [value / 96 for value in annotation["bbox"]]
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no box is at least a pixel wide and high"):
        check(coco(folder, filter_cfg={"filter_empty_gt": False}))


@pytest.mark.parametrize("content", ["", "text", "cut"])
def test_files_that_cannot_be_read(folder, tmp_path, content):
    def spoil(path):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 3] if content == "cut" else content.encode())

    dataset = coco(folder)
    check(dataset)
    spoil(folder / "images" / "0001.jpg")
    assert dataset[0]
    with pytest.raises(UserError, match=r"image .*0001\.jpg cannot be read"):
        dataset[1]
    folder = write_masks(tmp_path / "masks", 2)
    dataset = masks(folder)
    check(dataset)
    spoil(folder / "masks" / "0001.png")
    with pytest.raises(UserError, match=r"mask .*0001\.png cannot be read"):
        dataset[1]
    (folder / "masks" / "0000.png").unlink()
    with pytest.raises(UserError, match=r"mask .*0000\.png cannot be read: .*No such file"):
        dataset[0]


def test_boxes_alone_where_masks_are_wanted(folder):
    edit(folder, lambda content: [a.pop("segmentation") for a in content["annotations"]])
    dataset = coco(folder)
    check(dataset)
    with pytest.raises(UserError, match="have no segmentation; use a detector without masks"):
        dataset[0]


def test_classes_and_categories(folder, told):
    with pytest.raises(UserError, match="has no category disk, .*its categories: disc, square"):
        check(coco(folder, ("disk", "square", "triangle")))
    with pytest.raises(UserError, match=r"write classes = \('disc', 'square', 'triangle'\)"):
        check(coco(folder, ("square", "disc", "triangle")))
    check(coco(folder, ("triangle",), filter_cfg={"filter_empty_gt": False}))
    assert "have categories outside the config's classes and are ignored" in told
    with pytest.raises(UserError, match="config's classes: category disc is listed more than once"):
        check(coco(folder, ("disc", "disc", "square")))
    edit(folder, lambda content: content["annotations"][1].update(category_id=9))
    with pytest.raises(UserError, match="annotation 2 has the unknown category_id 9"):
        check(coco(folder))


def test_image_of_another_size(folder):
    edit(folder, lambda content: content["images"][1].update(width=50))
    dataset = coco(folder)
    check(dataset)
    assert dataset[0]
    with pytest.raises(UserError, match=r"0001\.jpg has 96 x 96 pixels, .* gives 50 x 96"):
        dataset[1]


def test_images_without_boxes(folder):
    def empty(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 2]

    edit(folder, empty)
    kept = coco(folder, filter_cfg={"filter_empty_gt": False})
    check(kept)
    assert [len(kept[i]["gt_bboxes"]) > 0 for i in range(3)] == [False, False, True]


PIPELINE = ({"type": "LoadImageFromFile"}, {"type": "mmseg.LoadAnnotations"})


def masks(folder, pipeline=PIPELINE, **options):
    register_all_modules()
    return BaseSegDataset(
        data_prefix={"img_path": str(folder / "images"), "seg_map_path": str(folder / "masks")},
        metainfo={"classes": ("ground", *SHAPES)},
        pipeline=list(pipeline),
        **options,
    )


def test_masks_whose_zero_is_no_class(tmp_path):
    folder = write_masks(tmp_path / "masks", 1)
    Image.fromarray(np.full((96, 96), 5, "uint8")).save(folder / "masks" / "0000.png")
    dataset = masks(folder, reduce_zero_label=True)
    check(dataset)
    with pytest.raises(UserError, match=r"has the value 5, but there are 4 classes \(1 to 4\)"):
        dataset[0]


def test_masks_of_several_views(tmp_path):
    folder = write_masks(tmp_path / "masks", 1)
    Image.fromarray(np.full((96, 96), 5, "uint8")).save(folder / "masks" / "0000.png")
    views = [[{"type": "Resize", "scale_factor": s} for s in (0.5, 1.0)], [PIPELINE[1]]]
    dataset = masks(folder, [PIPELINE[0], {"type": "mmseg.TestTimeAug", "transforms": views}])
    check(dataset)
    with pytest.raises(UserError, match="has the value 5"):
        dataset[0]


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (np.full((96, 96), 4), "L", r"has the value 4, but there are 4 classes \(0 to 3\)"),
        (np.full((96, 96), 254), "L", "has the value 254"),
        (np.zeros((96, 90)), "L", "has 90 x 96 pixels, its image 96 x 96"),
        (np.zeros((96, 96, 3)), "RGB", "is an image of mode RGB"),
        (np.full((96, 96), 255), "L", None),
        (np.full((96, 96), 3), "P", None),
    ],
)
def test_masks(tmp_path, values, mode, message):
    folder = write_masks(tmp_path / "masks", 2)
    mask = Image.fromarray(values.astype("uint8"))
    if mode == "P":
        mask.putpalette([value for value in range(256) for _ in "RGB"])
    mask.save(folder / "masks" / "0001.png")
    dataset = masks(folder)
    check(dataset)
    assert dataset[0]
    if message is None:
        assert (dataset[1]["gt_seg_map"] == values).all()
    else:
        with pytest.raises(UserError, match=message):
            dataset[1]
