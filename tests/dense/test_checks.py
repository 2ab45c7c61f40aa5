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
from dense.annotations import clean
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

        def lines(self):
            return lines.getvalue()

    return Lines()


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


def test_image_of_another_size(folder):
    edit(folder, lambda content: content["images"][1].update(width=50))
    dataset = coco(folder)
    check(dataset)
    assert dataset[0]
    with pytest.raises(UserError, match=r"0001\.jpg has 96 x 96 pixels, .* gives 50 x 96: correct"):
        dataset[1]


def turn(path, size):
    """An image of that size, to be shown turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(path, exif=exif)


def test_sizes_of_images_before_they_are_turned(folder, tmp_path):
    turn(folder / "images" / "0001.jpg", (96, 60))
    edit(folder, lambda content: content["images"][1].update(width=96, height=60))
    dataset = coco(folder)
    check(dataset)
    with pytest.raises(UserError, match="has 60 x 96 pixels.* before it is turned"):
        dataset[1]
    folder = write_masks(tmp_path / "masks", 2)
    turn(folder / "images" / "0001.jpg", (96, 60))
    Image.new("L", (96, 60)).save(folder / "masks" / "0001.png")
    dataset = masks(folder)
    check(dataset)
    with pytest.raises(UserError, match="its image 60 x 96: .* before it is turned"):
        dataset[1]


def test_boxes_are_computed_of_run_lengths(folder):
    content = json.loads((folder / "annotations.json").read_text())
    annotation = content["annotations"][0]
    image = next(x for x in content["images"] if x["id"] == annotation["image_id"])
    height, width = image["height"], image["width"]
    # column by column: four rows of the eleventh column, from the eleventh row on
    counts = [10 * height + 10, 4, (width - 10) * height - 14]
    annotation.update(segmentation={"size": [height, width], "counts": counts}, bbox=None)
    kept, lines = clean(content, folder / "annotations.json", SHAPES, True)
    assert kept["annotations"][0]["bbox"] == [10, 10, 1, 4]
    assert "have no bbox, which is computed" in "\n".join(lines)


def test_turned_images_are_told(folder, tmp_path, told):
    check(coco(folder))
    assert "EXIF" not in told
    turn(folder / "images" / "0001.jpg", (96, 96))  # square: no size can tell
    dataset = coco(folder)
    dataset.pipeline.transforms[0].color_type = "color_ignore_orientation"
    check(dataset)
    assert "EXIF" not in told
    check(coco(folder))
    assert "1 of 3 images looked at are turned as their EXIF metadata say" in told
    assert "0001.jpg" in told


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


def test_values_of_masks_are_told(tmp_path, told, monkeypatch):
    folder = write_masks(tmp_path / "masks", 3)
    paths = sorted((folder / "masks").iterdir())

    def fill(*values):
        for path in paths:
            mask = np.zeros((96, 96), "uint8")
            for row, value in enumerate(values):
                mask[row :: len(values)] = value
            Image.fromarray(mask).save(path)
        check(masks(folder))

    fill(0, 1, 2, 3)
    assert "masks" not in told
    fill(0, 3)
    assert "3 masks looked at have no pixel of 2 of the 4 classes: disc, square" in told
    fill(0, 255)
    assert "the masks hold 0 and 255 only, and 255 is ignored" in told
    with pytest.raises(UserError, match="the 3 masks looked at hold only 255, which are ignored"):
        fill(255)
    monkeypatch.setattr(dense.checks, "SOME", 2)  # the third may have classes
    fill(255)
    assert "the 2 masks looked at hold only 255" in told
    dataset = masks(folder)
    dataset._metainfo["label_map"] = {7: 0, 8: 1, 9: 2, 4: 3}
    for path in paths:
        Image.fromarray(np.array([[4, 7], [8, 9]], "uint8")).save(path)
    dataset.label_map = dataset._metainfo["label_map"]
    before = len(str(told.lines()))
    check(dataset)
    assert len(str(told.lines())) == before


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
