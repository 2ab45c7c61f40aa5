"""What is repaired, left out, told of and refused in annotations of COCO's format."""

import copy
import json
import math
from pathlib import Path

import pytest

from dense.annotations import clean, read
from runtime.errors import UserError

CLASSES = ["disc", "square"]
SQUARE = [10, 10, 30, 10, 30, 20, 10, 20]


def sound():
    annotation = {"image_id": 7, "bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0}
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 96, "height": 64},
                   {"id": 8, "file_name": "b.jpg", "width": 96, "height": 64}],
        "categories": [{"id": 3, "name": "disc"}, {"id": 5, "name": "square"}],
        "annotations": [
            annotation | {"id": number, "category_id": 3, "segmentation": [[*SQUARE]]}
            for number in (1, 2, 3)
        ],
    }  # fmt: skip


def cleaned(change, masks=True, classes=CLASSES):
    """The annotations by id after a change to the second one, and what is told."""
    content = sound()
    change(content)
    before = copy.deepcopy(content)
    result, lines = clean(content, Path("a.json"), classes, masks)
    assert content == before  # repairs are made in a copy
    return (content if result is None else result)["annotations"], "\n".join(lines)


def second(**changes):
    return lambda content: content["annotations"][1].update(changes)


def without(key):
    return lambda content: content["annotations"][1].pop(key)


def test_sound_annotations_stay_as_they_are():
    assert clean(sound(), Path("a.json"), CLASSES, True) == (None, [])


@pytest.mark.parametrize("area", [0, -1, None, math.nan, "9"])
def test_area_is_computed(area):
    kept, told = cleaned(second(area=area))
    assert [a["area"] for a in kept] == [200, 200, 200]
    assert "1 of 3 annotations have no area above 0, which is computed: 2" in told
    # of the polygon, not of the box
    triangle = [10, 10, 30, 10, 10, 20]
    kept, _ = cleaned(second(area=area, segmentation=[triangle]))
    assert kept[1]["area"] == 100


def test_missing_keys_are_computed_or_named():
    for key in ("area", "iscrowd", "bbox"):
        kept, _ = cleaned(without(key))
        assert kept[1] == sound()["annotations"][1]
    for key in ("image_id", "category_id"):
        with pytest.raises(UserError, match=f"a.json: annotation 2 has no {key}"):
            cleaned(without(key))
    with pytest.raises(UserError, match="annotation 2 of image 7 has no bbox"):
        cleaned(lambda c: [c["annotations"][1].pop(k) for k in ("bbox", "segmentation")], False)
    for key in ("id", "file_name", "width", "height"):
        with pytest.raises(UserError, match=f"has no {key}"):
            cleaned(lambda content, key=key: content["images"][1].pop(key))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([10, 10, 0.5, 10], "less than a pixel"),
        ([10, 10, -5, 10], "less than a pixel"),
        ([math.nan, 10, 5, 10], "not finite"),
        ([10, 10, math.inf, 10], "not finite"),
        ([96, 10, 5, 10], "outside their image"),
        ([10, 64, 5, 10], "outside their image"),
        ([-5, 10, 5, 10], "outside their image"),
        ([10, -9, 5, 9], "outside their image"),
    ],
)
def test_boxes_that_show_nothing_are_left_out(box, reason):
    kept, told = cleaned(second(bbox=box))
    assert [a["id"] for a in kept] == [1, 3]
    assert "1 of 3 annotations have a b" in told
    assert reason in told
    assert told.endswith(": 2")


@pytest.mark.parametrize("box", [[90, 10, 20, 9], [5, 60, 9, 20], [-5, 9, 9, 9], [5, -9, 9, 12]])
def test_boxes_beyond_an_edge_are_kept_and_told(box):
    kept, told = cleaned(second(bbox=box))
    assert len(kept) == 3
    assert "1 of 3 annotations reach beyond their image" in told


@pytest.mark.parametrize("box", [[1, 2, 3], "1 2 3 4", [1, 2, 3, "4"], {"x": 1}, [1, 2, 3, True]])
def test_boxes_of_another_form_are_refused(box):
    with pytest.raises(UserError, match="annotation 2 of image 7: its bbox .* is not four numbers"):
        cleaned(second(bbox=box))


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [], "x"])
def test_polygons_that_have_no_area(polygon):
    kept, told = cleaned(second(segmentation=[polygon, SQUARE]))
    assert kept[1]["segmentation"] == [SQUARE]
    assert "not the numbers of three or more points" in told
    kept, told = cleaned(second(segmentation=[polygon]))
    assert [a["id"] for a in kept] == [1, 3]
    assert "no usable segmentation" in told
    # a detector without masks keeps the box
    kept, _ = cleaned(second(segmentation=[polygon]), masks=False)
    assert [a["id"] for a in kept] == [1, 2, 3]
    assert kept[1]["segmentation"] == []


def test_masks_as_run_lengths_stay():
    mask = {"size": [64, 96], "counts": "abc"}
    kept, told = cleaned(second(segmentation=mask))
    assert kept[1]["segmentation"] == mask
    assert not told


@pytest.mark.parametrize("number", [0, 1, None, "x", 1.5])
def test_ids_that_evaluation_would_confuse_are_new(number):
    kept, told = cleaned(second(id=number))
    assert [a["id"] for a in kept] == [1, 2, 3]
    assert "new ids from 1 on" in told


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_references_to_nothing_are_refused(key):
    with pytest.raises(UserError, match=f"annotation 2 has the unknown {key} 77"):
        cleaned(second(**{key: 77}))
    with pytest.raises(
        UserError, match=f"annotation 2: its {key} '7' is text, but the ids are num"
    ):
        cleaned(second(**{key: "7"}))
    with pytest.raises(UserError, match=f"annotation 2: its {key} is \\[7\\]"):
        cleaned(second(**{key: [7]}))


def test_ids_may_be_text_throughout():
    def change(content):
        for image in content["images"]:
            image["id"] = f"image {image['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = "image 7"

    assert not cleaned(change)[1]


def test_images_that_are_listed_twice():
    with pytest.raises(UserError, match="two have the id 7"):
        cleaned(lambda content: content["images"][1].update(id=7))
    _, told = cleaned(lambda content: content["images"][1].update(file_name="a.jpg"))
    assert "1 files are listed under several ids: a.jpg" in told


def test_crowds_are_counted_and_nothing_but_them_is_refused():
    kept, told = cleaned(second(iscrowd=1))
    assert len(kept) == 3
    assert "1 of 3 annotations are crowds" in told
    with pytest.raises(UserError, match="of 3 annotations none is left: 3 of 3 .* crowds"):
        cleaned(lambda content: [a.update(iscrowd=1) for a in content["annotations"]])
    with pytest.raises(UserError, match="none is left: 3 of 3 annotations have a box of less than"):
        cleaned(
            lambda content: [a.update(bbox=[0.1, 0.1, 0.2, 0.2]) for a in content["annotations"]]
        )


def test_classes_and_categories():
    _, told = cleaned(second(category_id=5), classes=["disc"])
    assert "1 of 3 annotations have categories outside the config's classes" in told
    with pytest.raises(
        UserError, match="has no category 'disk', .*its categories: 'disc', 'square'"
    ):
        cleaned(second(), classes=["disk", "square"])
    content, told = clean(sound(), Path("a.json"), ["square", "disc"], True)
    assert [category["id"] for category in content["categories"]] == [5, 3]
    assert content["annotations"] == sound()["annotations"]
    assert "reordered to the config's classes" in "".join(told)
    with pytest.raises(UserError, match="config's classes: category disc is listed more than once"):
        cleaned(second(), classes=["disc", "disc"])


def test_a_file_without_annotations_is_for_tests_only():
    empty = sound() | {"annotations": []}
    for part in ("train", "val"):
        with pytest.raises(UserError, match=r"a\.json: it has no annotations"):
            clean(empty, Path("a.json"), CLASSES, True, part)
    content, told = clean(empty, Path("a.json"), CLASSES, True, "test")
    assert (content, told) == (None, ["no annotations: there is nothing to compare with"])


def test_evaluation_keeps_boxes_that_training_leaves_out():
    for box in ([10, 10, 0.5, 10], [96, 10, 5, 10]):
        changed = sound()
        changed["annotations"][1]["bbox"] = box
        content, told = clean(changed, Path("a.json"), CLASSES, True, "val")
        assert content is None
        assert "1 of 3 annotations have a box" in told[0]


@pytest.mark.parametrize(
    ("polygon", "area"),
    [([None] * 6, 200), (["1"] * 6, 0), ([[1, 2]] * 6, 0), ([math.nan, *SQUARE[1:]], 0)],
)
def test_polygons_of_something_else(polygon, area):
    kept, told = cleaned(second(segmentation=[polygon, SQUARE], area=area))
    assert kept[1]["segmentation"] == [SQUARE]
    assert kept[1]["area"] == 200
    assert "polygons that are not the numbers" in told


def test_run_lengths_of_another_size():
    mask = {"size": [96, 64], "counts": [64 * 10 + 10, 4, 64 * 86 - 14]}
    with pytest.raises(UserError, match=r"annotation 2 of image 7: the size of its segmentation"):
        cleaned(second(segmentation=mask))


def test_other_marks_of_crowds():
    kept, told = cleaned(second(iscrowd="1"))
    assert kept[1]["iscrowd"] == 1
    assert "have the iscrowd '1', which becomes 1" in told
    with pytest.raises(UserError, match="none is left"):
        cleaned(lambda content: [a.update(ignore=1) for a in content["annotations"]])


@pytest.mark.parametrize(("what", "key"), [("images", "file_name"), ("categories", "name")])
def test_names_of_another_type(what, key):
    with pytest.raises(UserError, match=f"its {key} is \\['a'\\]"):
        cleaned(lambda content: content[what][1].update({key: ["a"]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not in COCO's format"),
        ("text", "not in COCO's format"),
        ("[]", "holds a list"),
        ('{"images": [], "annotations": []}', "no list of categories"),
        ('{"images": [1], "annotations": [], "categories": []}', "not all of its images"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_of_another_form(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(path)
    path.write_text(json.dumps(sound()))
    assert read(path) == sound()
