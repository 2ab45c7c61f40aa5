"""Which images a data set has, in which classes, and which of them are held out."""

import os
import re
import tarfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from checkpoints.sources import SavedRun, continued
from config.command_line import parse_args
from config.flags import AugmentConfig, DataConfig
from datasets import build_data
from input_pipeline.folders import find_images, list_classes
from input_pipeline.images import Decoding
from input_pipeline.listing import Listing, held_out, held_out_by_draw
from input_pipeline.parts import find_parts
from input_pipeline.tar_files import TarImages, list_tars
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError


def write(root, *paths):
    """Image files, or whatever the suffix says, of a few bytes that are the path."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(path))


def images(root, counts):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            colour = (20 * label + index, 0, 0)
            Image.new("RGB", (8, 8), colour).save(root / name / f"{index:02d}.png")


def found(listing):
    """Class and path of each image."""
    root = listing.root + "/"
    return [
        (listing.classes[label], listing[i].removeprefix(root))
        for i, label in enumerate(listing.labels.tolist())
    ]


def opened(root, saved=None, **flags):
    config = DataConfig("image_folder", str(root), **flags)
    return build_data(config, AugmentConfig(), 32, saved=saved)


def test_the_order_is_that_of_torchvision(tmp_path):
    paths = [
        "b/2.png",
        "b/10.png",
        "b/sub/1.png",
        "b/sub-2/1.png",
        "b/Z.jpg",
        "a b/x.PNG",
        "a/x.jpg",
    ]
    write(tmp_path, *paths, "b/sub/deep/q.webp", "B/1.png")
    theirs = ImageFolder(tmp_path)
    ours = list_classes(tmp_path)
    assert ours.classes == theirs.classes
    assert [(ours[i], int(ours.labels[i])) for i in range(len(ours))] == theirs.samples


@pytest.mark.parametrize(
    "path",
    ["cat/._0.png", "cat/.hidden/0.png", ".cache/0.png", "cat/@eaDir/0.png/THUMB_M.png"]
    + ["__MACOSX/cat/0.png", "cat/Thumbs.db", "cat/.ipynb_checkpoints/0-checkpoint.png"]
    + ["#recycle/0.png", "cat/lost+found/0.png", "$RECYCLE.BIN/a/0.png", ".DS_Store"],
)
def test_hidden_files_and_those_of_systems_are_not_images(tmp_path, path):
    write(tmp_path, "cat/0.png", "dog/0.png", path)
    listing = list_classes(tmp_path)
    assert found(listing) == [("cat", "cat/0.png"), ("dog", "dog/0.png")]
    assert listing.skipped == {}
    assert find_images([str(tmp_path)]) == [tmp_path / "cat/0.png", tmp_path / "dog/0.png"]


def test_folders_of_runs_are_not_classes(tmp_path):
    write(tmp_path, "cat/0.png", "dog/0.png", "runs/a/curves.png", "out/curves.png")
    for run in ("runs/a", "out"):
        (tmp_path / run / ".lock").write_text("process 7 on host\n")
    assert list_classes(tmp_path).classes == ["cat", "dog"]
    assert len(find_images([str(tmp_path)])) == 2
    (tmp_path / ".lock").write_text("process 7 on host\n")  # output_dir is data_path
    assert list_classes(tmp_path).classes == ["cat", "dog"]
    (tmp_path / "cat/.lock").write_text("of another program")
    assert len(find_images([str(tmp_path)])) == 2


def test_links_to_themselves_and_what_a_run_has_forgotten(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png", "forgotten/1/log.txt", "forgotten/2.png")
    (tmp_path / "cat/self").symlink_to("self")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / ".lock").write_text("process 1 on here\n")
    assert list_classes(tmp_path).classes == ["cat", "dog"]
    (tmp_path / ".lock").unlink()  # without a run, it is a class
    assert list_classes(tmp_path).classes == ["cat", "dog", "forgotten"]


def test_links_are_followed_and_each_folder_counts_once(tmp_path):
    write(tmp_path, "real/cat/0.png", "real/dog/0.png", "real/dog/sub/1.png", "other/2.png")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(tmp_path / "real" / name)
    inside = [("cat", "cat/0.png"), ("dog", "dog/0.png"), ("dog", "dog/sub/1.png")]
    assert found(list_classes(linked)) == inside
    assert len(find_images([str(linked)])) == 3
    # loops, and links from one class into another, bring no image twice
    real = tmp_path / "real"
    for name, target in {"all": "..", "dogs": "../dog", "sub": "../dog/sub", "self": "."}.items():
        (real / "cat" / name).symlink_to(target)
    (real / "cat/above").symlink_to("../..")
    assert found(list_classes(real)) == inside
    assert len(find_images([str(real)])) == 3
    (real / "cat/more").symlink_to(tmp_path / "other")
    (real / "cat/3.png").symlink_to(tmp_path / "other/2.png")
    assert [path for _, path in found(list_classes(real))][:3] == [
        "cat/0.png", "cat/3.png", "cat/more/2.png",
    ]  # fmt: skip


def test_every_suffix_that_pillow_reads(tmp_path):
    suffixes = [
        "jpg",
        "JPEG",
        "jfif",
        "jpe",
        "png",
        "PNG",
        "webp",
        "bmp",
        "tif",
        "gif",
        "jp2",
        "avif",
    ]
    write(tmp_path, *(f"cat/{i}.{suffix}" for i, suffix in enumerate(suffixes)), "cat/a.txt")
    write(tmp_path, "cat/b.txt", "cat/c.json", "cat/movie.mpg", "cat/none", "readme.md", "x.png")
    listing = list_classes(tmp_path)
    assert len(listing) == len(suffixes)
    kinds = {".txt": 2, ".json": 1, ".mpg": 1, "without a suffix": 1}
    assert listing.skipped == kinds | {".md in no class folder": 1, ".png in no class folder": 1}


def test_names_are_compared_in_nfc_and_may_be_any_bytes(tmp_path):
    composed, decomposed = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    images(tmp_path / "train", {composed: 2, "dog": 2, os.fsdecode(b"b\xe9"): 1})
    images(tmp_path / "val", {decomposed: 1, "dog": 1, os.fsdecode(b"b\xe9"): 1})
    data = opened(tmp_path)
    assert data.classes == [os.fsdecode(b"b\xe9"), composed, "dog"]
    assert [data.val[i][1] for i in range(3)] == [0, 1, 2]
    both = tmp_path / "both"
    images(both, {composed: 2, decomposed: 3, "dog": 1})
    assert list_classes(both).counts().tolist() == [5, 1]


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        (["Train", "Val"], {"train": "Train", "val": "Val"}),
        (
            ["training", "validation", "test"],
            {"train": "training", "val": "validation", "test": "test"},
        ),
        (["Training", "Testing"], {"train": "Training", "test": "Testing"}),
        (["train", "valid", "test"], {"train": "train", "val": "valid", "test": "test"}),
        (["training_set", "test_set"], {"train": "training_set", "test": "test_set"}),
        (["TrainImages", "dev-images"], {"train": "TrainImages", "val": "dev-images"}),
        (["trainset", "val2017"], {"train": "trainset", "val": "val2017"}),
        (["train", "val", "val_images"], {"train": "train", "val": "val"}),
        (["freight_train", "express_train", "bus"], {}),
        (["constrain", "contest", "evaluator", "validator"], {}),
    ],
)
def test_parts_by_the_names_of_folders(tmp_path, folders, parts):
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert {part: path.name for part, path in find_parts(tmp_path).items()} == parts


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["seg_train", "seg_test"], "which look like parts of a data set"),
        (["Train", "Training", "val"], "holds both Train/ and Training/: call one of them train/"),
    ],
)
def test_names_that_may_be_parts_are_refused(tmp_path, folders, message):
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=message):
        find_parts(tmp_path)


def test_names_that_look_like_parts_are_classes_beside_evaluation_images(tmp_path):
    names = ("bullet_train", "test_tube", "cat")
    for root in ("a", "b"):
        images(tmp_path / root, dict.fromkeys(names, 1))
    with pytest.raises(UserError, match="look like parts"):
        opened(tmp_path / "a", val_fraction=0.5)
    data = opened(tmp_path / "a", eval_data_path=str(tmp_path / "b"))
    assert data.classes == sorted(names)
    assert find_parts(tmp_path / "a", guesses=False) == {}


def test_the_same_folder_for_both_is_shared(tmp_path, caplog):
    images(tmp_path / "a", {"cat": 10, "dog": 10})
    images(tmp_path / "b", {"cat": 1, "dog": 1})
    other_name = str(tmp_path / "b/../a")
    data = opened(tmp_path / "a", eval_data_path=other_name, val_fraction=0.5)
    assert len(data.train) + len(data.val) == 20
    data = opened(tmp_path / "a", eval_data_path=str(tmp_path / "b"), val_fraction=0.5)
    assert (len(data.train), len(data.val)) == (20, 2)
    assert "--val_fraction 0.5 is not used" in caplog.text


def test_parts_are_never_classes(tmp_path, caplog):
    caplog.set_level("INFO")
    for part in ("Training", "Testing"):
        images(tmp_path / "a" / part, {"cat": 3, "dog": 3})
    data = opened(tmp_path / "a")
    assert (data.classes, len(data.train), len(data.val)) == (["cat", "dog"], 6, 6)
    assert "2 classes (cat, dog): 6 training images, 6 evaluation images" in caplog.text
    # a share of the training images leaves test images alone
    data = opened(tmp_path / "a", val_fraction=0.3)
    assert (len(data.train) + len(data.val), "Testing is not used" in caplog.text) == (6, True)
    images(tmp_path / "b", {"cat": 3, "dog": 3, "test": 3})
    with pytest.raises(UserError, match="holds test but no train/"):
        opened(tmp_path / "b", val_fraction=0.3)
    # given as the evaluation folder, it is left out of the training folder
    images(tmp_path / "b/test", {"cat": 1, "dog": 1})
    for file in (tmp_path / "b/test").glob("*.png"):
        file.unlink()
    data = opened(tmp_path / "b", eval_data_path=str(tmp_path / "b/test"))
    assert (data.classes, len(data.train), len(data.val)) == (["cat", "dog"], 6, 2)
    with pytest.raises(UserError, match="holds Training/, which is no class of"):
        opened(tmp_path / "a", eval_data_path=str(tmp_path / "b/test"))
    # in both folders it is the name of a class
    for part in "xy":
        images(tmp_path / "c" / part, {"bus": 1, "train": 1})
    data = opened(tmp_path / "c/x", eval_data_path=str(tmp_path / "c/y"))
    assert data.classes == ["bus", "train"]


def test_a_class_without_evaluation_images_is_told(tmp_path, caplog):
    images(tmp_path / "train", {"cat": 2, "dog": 2, "emu": 2})
    images(tmp_path / "val", {"cat": 1, "emu": 1})
    for folder in (None, "dog"):  # no folder, and an empty one
        if folder:
            (tmp_path / "val" / folder).mkdir()
        data = opened(tmp_path)
        assert data.classes == ["cat", "dog", "emu"]
        assert [data.val[i][1] for i in range(2)] == [0, 2]
        assert "no evaluation images of 1 of the 3 classes: dog" in caplog.text
        caplog.clear()
    (tmp_path / "val/results").mkdir()  # of an evaluation, say
    assert opened(tmp_path).classes == ["cat", "dog", "emu"]
    (tmp_path / "train/fox").mkdir()
    with pytest.raises(UserError, match="no training images of class fox"):
        opened(tmp_path)


def run_of(*classes):
    return SavedRun("c.pth", [*classes], {"data_set": "image_folder"})


def test_labels_are_those_of_the_checkpoint_by_name(tmp_path, caplog):
    caplog.set_level("INFO")
    numbers = [str(number) for number in range(12)]
    images(tmp_path, dict.fromkeys(numbers, 1))
    config = DataConfig("image_folder", str(tmp_path))

    def labels(saved):
        data = build_data(config, AugmentConfig(), 32, with_train=False, saved=saved)
        return {Path(data.val.name(i)).parent.name: data.val[i][1] for i in range(12)}

    by_text = {name: label for label, name in enumerate(sorted(numbers))}
    by_number = {name: int(name) for name in numbers}
    assert labels(None) == by_text
    assert labels(run_of(*numbers)) == by_number
    assert labels(run_of(*sorted(numbers))) == by_text
    assert "sorted as numbers" not in caplog.text
    without_names = SavedRun("c.pth", [], {"data_set": "IMNET"})
    # the release's image_folder sorted folders as text, and saved no names
    assert labels(run_of()) == by_text
    assert "sorted as numbers" not in caplog.text
    assert labels(without_names) == by_number
    assert (
        "c.pth does not name its classes: the folders 0 to 11 are sorted as numbers" in caplog.text
    )
    with pytest.raises(
        UserError, match=r"has 12 classes \(a, b, .*\), the data 12 .* of which 0, 1, 10, 11, 2"
    ):
        labels(run_of(*"abcdefghijkl"))
    for number in reversed(range(12)):
        (tmp_path / str(number)).rename(tmp_path / str(number + 1))
    from_1 = labels(without_names)
    assert from_1 == {name: label for label, name in enumerate(sorted(from_1))}
    assert "and the folders are sorted as text: 1, 10, 11, 12, 2, ..." in caplog.text
    for number in range(12):
        (tmp_path / str(number + 1)).rename(tmp_path / str(number))
    # a resumed training numbers its images by the checkpoint, too
    images(tmp_path / "p/train", {"cat": 1, "dog": 1})
    images(tmp_path / "p/val", {"dog": 1})
    data = opened(tmp_path / "p", run_of("dog", "cat"))
    assert [data.train[i][1] for i in range(2)] == [1, 0]
    assert [data.train.labels.tolist(), data.val[0][1]] == [[1, 0], 0]
    with pytest.raises(UserError, match="no training images of class emu"):
        opened(tmp_path / "p", run_of("dog", "cat", "emu"))


def listing_of(counts, root="/data"):
    """A listing without files."""
    paths = [(label, f"{name}/{i:04d}.jpg") for label, (name, n) in enumerate(counts.items())
             for i in range(n)]  # fmt: skip
    return Listing.of(root, [*counts], paths, {})


def test_a_hash_holds_images_out_and_others_move_none():
    counts = {"ant": 400, "bee": 300, "cow": 2, "dog": 12}
    listing = listing_of(counts)
    chosen = held_out(listing, 0.25)
    assert sorted(torch.cat((chosen["train"], chosen["val"])).tolist()) == list(range(714))
    val = {listing[i] for i in chosen["val"]}
    sizes = [sum(f"/{name}/" in path for path in val) for name in counts]
    assert sizes[0] == pytest.approx(100, abs=30)
    assert sizes[1] == pytest.approx(75, abs=26)
    assert sizes[2] == 1
    # more images and classes, elsewhere
    more = listing_of({"aardvark": 50, "ant": 500, "bee": 299, "cow": 2, "dog": 13}, "/moved")
    again = {more[i].replace("/moved", "/data") for i in held_out(more, 0.25)["val"]}
    before = set(map(listing.__getitem__, range(len(listing))))
    both = before & {more[i].replace("/moved", "/data") for i in range(len(more))}
    assert again & both == val & both
    with pytest.raises(UserError, match="emu has 1 image: .* leaves none for training"):
        held_out(listing_of({"ant": 2, "emu": 1}), 0.2)


def test_both_sides_have_an_image_of_each_class():
    listing = listing_of({str(name): 2 + name % 3 for name in range(300)})
    for fraction in (0.01, 0.9):
        chosen = held_out(listing, fraction)
        for indices in chosen.values():
            assert len(listing.labels[indices].unique()) == 300


def test_the_earlier_draw():
    # NumPy's RandomState(0): permutation(10) begins with 2, 8, permutation(5) with 2
    listing = listing_of({"ant": 10, "bee": 5})
    chosen = [listing[i] for i in held_out_by_draw(listing, 0.2)["val"]]
    assert chosen == ["/data/ant/0002.jpg", "/data/ant/0008.jpg", "/data/bee/0002.jpg"]


@pytest.mark.parametrize(
    ("flags", "choice"),
    [
        ({"val_fraction": 0.2}, "draw"),  # a run from before the flag
        ({"val_fraction": 0.2, "val_choice": "draw"}, "draw"),
        ({"val_fraction": 0.2, "val_choice": "hash"}, "hash"),
        ({}, "hash"),  # the release's, which held nothing out
    ],
)
def test_a_continued_run_keeps_its_held_out_images(tmp_path, flags, choice):
    torch.save({"model": {}, "args": flags}, tmp_path / "checkpoint-0.pth")
    command = ["--val_fraction", "0.2", "--model", "hornet_tiny_7x7"]
    for resumes in (["--output_dir", str(tmp_path)], ["--resume", f"{tmp_path}/checkpoint-0.pth"]):
        config, saved = continued(parse_args([*command, *resumes]), SINGLE_PROCESS)
        assert (config.data.val_choice, saved.flags) == (choice, flags)
    new, saved = continued(parse_args(command), SINGLE_PROCESS)
    assert (new.data.val_choice, saved) == ("hash", None)


@pytest.mark.parametrize(
    ("flags", "decoding"),
    [
        ({"data_set": "image_folder"}, (False, "none")),  # of the release, or before the flags
        ({"data_set": "tar"}, (False, "none")),
        ({"data_set": "IMNET"}, (None, "white")),
        ({"data_set": "image_folder", "exif_orientation": None}, (None, "white")),
    ],
)
def test_a_continued_run_decodes_its_images_as_before(tmp_path, flags, decoding):
    torch.save({"model": {}, "args": flags}, tmp_path / "c.pth")
    for more in ([], ["--eval", "true"]):
        config = parse_args(["--resume", str(tmp_path / "c.pth"), *more])
        data = continued(config, SINGLE_PROCESS)[0].data
        assert (data.exif_orientation, data.background) == decoding


def test_a_listing_takes_12_bytes_per_image():
    listing = listing_of({"ant": 1000})
    tensors = [value for value in vars(listing).values() if torch.is_tensor(value)]
    assert sum(t.nbytes for t in tensors) == 12 * 1000 + listing.text.nbytes
    assert listing.text.nbytes == 1000 * len("ant/0000.jpg")
    assert listing[999] == listing[-1] == "/data/ant/0999.jpg"
    with pytest.raises(IndexError):
        listing[1000]


def as_tar(path, folder, start="."):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, start)
    return path


def test_classes_and_places_in_tar_files(tmp_path):
    images(tmp_path / "a", {"10": 2, "9": 1})
    write(tmp_path / "a", "9/._00.png", "9/readme.txt", "__MACOSX/x.png")
    listing = list_tars(as_tar(tmp_path / "train.tar", tmp_path / "a"))
    assert listing.classes == ["9", "10"]  # as numbers, like timm's reader
    assert found(replace(listing, root="")) == [
        ("9", "9/00.png"),
        ("10", "10/00.png"),
        ("10", "10/01.png"),
    ]
    assert listing.skipped == {".txt": 1}
    number, offset, size = listing.places[1].tolist()
    content = Path(listing.tars[number]).read_bytes()[offset : offset + size]
    assert content == (tmp_path / "a/10/00.png").read_bytes()
    # a tar file per class, and one that holds tar files
    (tmp_path / "tars").mkdir()
    for name in ("10", "9"):
        as_tar(tmp_path / "tars" / f"{name}.tar", tmp_path / "a" / name)
    assert found(list_tars(tmp_path / "tars")) == [
        ("9", "9/00.png"),
        ("10", "10/00.png"),
        ("10", "10/01.png"),
    ]
    nested = list_tars(as_tar(tmp_path / "nested.tar", tmp_path / "tars"))
    assert nested.classes == ["9", "10"]
    number, offset, size = nested.places[-1].tolist()
    content = Path(nested.tars[number]).read_bytes()[offset : offset + size]
    assert content == (tmp_path / "a/10/01.png").read_bytes()


def test_links_in_tar_files(tmp_path):
    """tar writes the second of two hard links as a link to the first."""
    images(tmp_path / "a", {"cat": 1, "dog": 1})
    (tmp_path / "a/dog/hard.png").hardlink_to(tmp_path / "a/cat/00.png")
    (tmp_path / "a/dog/soft.png").symlink_to("../cat/00.png")
    (tmp_path / "a/dog/gone.png").symlink_to("gone")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted((tmp_path / "a").rglob("*.png")):
            tar.add(path, path.relative_to(tmp_path / "a"))
    listing = list_tars(tmp_path / "x.tar")
    assert [path for _, path in found(replace(listing, root=""))] == [
        "cat/00.png", "dog/00.png", "dog/hard.png", "dog/soft.png",
    ]  # fmt: skip
    assert listing.places[0].tolist() == listing.places[2].tolist() == listing.places[3].tolist()
    assert listing.skipped == {"links to what is not before them": 1}


def test_names_of_the_same_number_have_a_fixed_order(tmp_path):
    images(tmp_path / "a", dict.fromkeys(("1", "01", "A", "a"), 1))
    listing = list_tars(as_tar(tmp_path / "x.tar", tmp_path / "a"))
    assert listing.classes == ["01", "1", "A", "a"]


def test_a_replaced_member_counts_once(tmp_path):
    images(tmp_path / "a", {"cat": 1, "dog": 1})
    as_tar(tmp_path / "x.tar", tmp_path / "a")
    Image.new("RGB", (8, 8), (99, 0, 0)).save(tmp_path / "a/cat/00.png")
    with tarfile.open(tmp_path / "x.tar", "a") as tar:  # as tar -r does
        tar.add(tmp_path / "a/cat/00.png", "cat/00.png")
    data = TarImages(list_tars(tmp_path / "x.tar"), None, Decoding())
    assert len(data) == 2
    assert data.read(0)[0].getpixel((0, 0)) == (99, 0, 0)


@pytest.mark.parametrize("damage", ["byte", "cut"])
def test_a_damaged_header_is_not_the_end_of_a_tar_file(tmp_path, damage):
    images(tmp_path / "a", {"cat": 2, "dog": 2})
    path = as_tar(tmp_path / "x.tar", tmp_path / "a")
    with tarfile.open(path) as tar:
        place = tar.getmember("./dog/00.png").offset
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content if damage == "byte" else content[: place + 100])
    with pytest.raises(UserError, match=r"x\.tar cannot be read"):
        list_tars(path)


def test_labels_of_tar_files_and_parts_are_those_of_the_checkpoint(tmp_path):
    images(tmp_path / "a", {"cat": 2, "dog": 2})
    for part in ("train", "val"):
        as_tar(tmp_path / f"{part}.tar", tmp_path / "a")
    data = build_data(
        DataConfig("tar", str(tmp_path)), AugmentConfig(), 32, saved=run_of("dog", "cat")
    )
    for index in range(4):
        image, label = data.val.read(index)
        assert label == data.val.labels[index] == (image.getpixel((0, 0))[0] < 20)
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b/c")
    held_out_part = opened(tmp_path / "b/c", run_of("dog", "cat"), val_fraction=0.5).val
    for index in range(len(held_out_part)):
        image, label = held_out_part.read(index)
        assert label == held_out_part.labels[index] == (image.getpixel((0, 0))[0] < 20)


def test_a_rewritten_tar_file_has_its_new_labels(tmp_path):
    """Nothing is kept beside the data that could be of the former file."""
    config = DataConfig("tar", str(tmp_path))
    for order in (("cat", "dog"), ("dog", "cat")):
        (tmp_path / "train.tar").unlink(missing_ok=True)
        images(tmp_path / "-".join(order), dict.fromkeys(order, 2))
        as_tar(tmp_path / "train.tar", tmp_path / "-".join(order))
        data = build_data(config, AugmentConfig(), 32, with_val=False).train
        for index in range(4):
            image, label = data.read(index)
            assert (data.classes[label] == order[1]) == (image.getpixel((0, 0))[0] >= 20)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".tar"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tar", "cannot be read"),
        (b"", "no such images|cannot be read"),
        (None, "neither a tar file"),
    ],
)
def test_broken_tar_files_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list_tars(tmp_path / "x.tar")


def test_what_a_run_does_not_use_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    images(tmp_path / "train", {"cat": 4, "dog": 4})
    images(tmp_path / "unlabelled", {"x": 1})
    opened(tmp_path, val_fraction=0.5)
    assert "beside the parts, unlabelled is not used" in caplog.text
    with pytest.raises(UserError, match="--eval_data_path /nope is not a folder"):
        opened(tmp_path, eval_data_path="/nope")
    images(tmp_path / "b", {"cat": 1, "dog/old": 1})
    list_tars(as_tar(tmp_path / "x.tar", tmp_path / "b"))
    assert "folders of several depths: the innermost is the class" in caplog.text


def test_flags_that_change_what_an_evaluation_means_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    flags = {"data_set": "image_folder", "input_size": 32, "val_fraction": 0.2}
    flags |= {"exif_orientation": None, "background": "black", "data_path": "/data"}
    torch.save({"model": {}, "args": flags}, tmp_path / "c.pth")
    command = ["--data_set", "image_folder", "--data_path", "/data"]
    command += ["--eval", "true", "--resume", str(tmp_path / "c.pth")]
    continued(parse_args(command), SINGLE_PROCESS)
    for message in (
        "--input_size is 224, .* was trained with 32",
        "--background is white, .* was trained with black",
        "--val_fraction is 0, the run of .* held out 0.2: it has trained on some",
    ):
        assert re.search(message, caplog.text)
    caplog.clear()
    same = ["--input_size", "32", "--background", "black", "--val_fraction", "0.2"]
    continued(parse_args([*command, *same]), SINGLE_PROCESS)
    assert "held out" not in caplog.text
    assert "was trained with" not in caplog.text


@pytest.mark.parametrize("name", ["a\tb.png", "a\u2028b.png", "a\nb.png"])
def test_an_unreadable_image_of_any_name_is_one_line(tmp_path, name):
    unreadable = UnreadableImages(tmp_path / "bad_images.txt", 1)
    for _ in range(3):  # more than one image would be too many
        unreadable.add(name, "is broken")
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 1
