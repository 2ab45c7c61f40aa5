"""The published evaluation sets of ImageNet-1K, drawn, with a model whose logits are given."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import main
from config.command_line import parse_args
from config.flags import AugmentConfig, DataConfig
from datasets import build_data
from input_pipeline.imagenet_sets import (
    ALEXNET_ERRORS,
    EXTRA_CORRUPTIONS,
    RealLabels,
    mean_corruption_error,
    synsets,
)
from runtime.errors import UserError

SYNSETS = ImageNetInfo().label_names()
SMALL = {"base_dim": 16, "depths": [1, 1, 1, 1]}


def checkpoint(path, logits, classes=None):
    """A network with these logits, {class: logit}, for every image; all others are 0."""
    model = timm.create_model("hornet_atto_7x7", num_classes=len(classes or SYNSETS), **SMALL)
    weights = model.state_dict()
    weights["head.weight"].zero_()
    weights["head.bias"].zero_()
    for name, logit in logits.items():
        weights["head.bias"][(classes or SYNSETS).index(name)] = logit
    facts = {"classes": classes, "args": {"data_set": "image_folder"}} if classes else {}
    torch.save({"model": weights, **facts}, path)
    return str(path)


def draw(folder, counts, names="{}.png"):
    for inside, count in counts.items():
        (folder / inside).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.full((40, 40, 3), 20 * number, "uint8")
            Image.fromarray(pixels).save(folder / inside / names.format(number))
    return folder


def evaluated(data_set, data, resume, out, *flags):
    """The first row of --results_file, and what was predicted for each class."""
    table = out / "results.csv"
    command = ["--model", "hornet_atto_7x7", "--model_kwargs", json.dumps(SMALL), "--eval", "true"]
    command += ["--input_size", "32", "--num_workers", "0", "--device", "cpu", "--resume", resume]
    command += ["--data_set", data_set, "--data_path", str(data), "--results_file", str(table)]
    main.run(parse_args([*command, "--output_dir", str(out), *flags]))
    (*_, row) = rows_of(table)
    return row, {row["class"]: row["predicted"] for row in rows_of(out / "predictions.csv")}


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("imagenet_a", True),
        ("imagenet_r", False),
        ("imagenet_sketch", True),
        ("imagenet_v2", False),
        ("imagenet_v2", True),
    ],
)
def test_sets(tmp_path, capsys, name, named):
    own = [synset for synset in synsets(name) if synset in synsets("imagenet_a")][:3]
    outside = next(synset for synset in SYNSETS if synset not in synsets("imagenet_r")
                   and synset not in synsets("imagenet_a"))  # fmt: skip
    folders = own
    if name == "imagenet_v2":  # 10 is before 2 as text
        own, folders = [SYNSETS[2], SYNSETS[10], SYNSETS[999]], ["2", "10", "999"]
    data = draw(
        tmp_path / "data", dict(zip((f"deep/{f}" for f in folders), (1, 2, 5), strict=True))
    )
    (data / "deep" / "README.txt").write_text("text")
    logits = {outside: 9.0, own[1]: 3.0, own[0]: 2.0}
    order = SYNSETS[500:] + SYNSETS[:500] if named else None
    resume = checkpoint(tmp_path / "c.pth", logits, order)
    row, predicted = evaluated(name, data, resume, tmp_path)
    is_part = name in ("imagenet_a", "imagenet_r")
    assert {*predicted} == {*own}
    assert {*predicted.values()} == {own[1] if is_part else outside}
    # of 8 images, 2 are of the class with the highest logit inside the set
    assert float(row["top1"]) == (25 if is_part else 0)
    assert float(row["top5"]) >= 37.5
    told = f"evaluating over the 200 of the checkpoint's 1000 classes that {data} has"
    assert (told in capsys.readouterr().out) == is_part


def test_a_folder_with_some_of_the_classes(tmp_path, capsys):
    resume = checkpoint(tmp_path / "c.pth", {"ant": 9.0, "bee": 1.0}, ["cat", "ant", "dog", "bee"])
    data = draw(tmp_path / "data", {"bee": 3, "dog": 1})
    row, predicted = evaluated("image_folder", data, resume, tmp_path)
    assert predicted == {"bee": "bee", "dog": "bee"}
    assert (row["top1"], row["top1_err"]) == ("75.000", "25.000")
    assert "evaluating over the 2 of the checkpoint's 4 classes" in capsys.readouterr().out
    (data / "cat").mkdir()
    (data / "ant").mkdir()  # empty folders are classes, too
    row, predicted = evaluated("image_folder", data, resume, tmp_path)
    assert predicted == {"bee": "ant", "dog": "ant"}
    assert row["top1"] == "0.000"
    assert len(rows_of(tmp_path / "results.csv")) == 2


def test_own_evaluation_images_are_evaluated_as_in_the_run(tmp_path, capsys):
    data = draw(tmp_path / "data", {"val/bee": 3, "val/dog": 1})
    resume = checkpoint(tmp_path / "c.pth", {"ant": 9.0}, ["cat", "ant", "dog", "bee"])
    state = torch.load(resume)
    state["args"] |= {"data_path": str(data)}
    torch.save(state, resume)
    _, predicted = evaluated("image_folder", data, resume, tmp_path)
    assert {*predicted.values()} == {"ant"}
    (tmp_path / "one").mkdir()
    one = draw(tmp_path / "one", {"bee": 3})
    _, predicted = evaluated("image_folder", one, resume, tmp_path)
    assert predicted == {"bee": "ant"}
    assert "has the class bee only: evaluating over all 4 classes" in capsys.readouterr().out


def test_files_of_results(tmp_path):
    data = draw(tmp_path / "data", {"bee": 3, "dog": 1})
    resume = checkpoint(tmp_path / "c.pth", {}, ["bee", "dog"])
    table = tmp_path / "results.csv"
    table.touch()
    evaluated("image_folder", data, resume, tmp_path)
    table.write_text(table.read_text().rstrip("\n"))  # as some editors leave it
    evaluated("image_folder", data, resume, tmp_path)
    assert [row["model"] for row in rows_of(table)] == ["hornet_atto_7x7"] * 2
    nowhere = ["--results_file", str(tmp_path / "none/r.csv")]
    with pytest.raises(UserError, match="--results_file .* cannot be written"):
        evaluated("image_folder", data, resume, tmp_path, *nowhere)


def test_predictions_are_of_their_files(tmp_path):
    """Unreadable images are left out of all that is told."""
    data = draw(tmp_path / "data", {f"fog/1/{SYNSETS[2]}": 2, f"fog/2/{SYNSETS[4]}": 1})
    (data / f"fog/1/{SYNSETS[2]}/0.png").write_text("text")
    resume = checkpoint(tmp_path / "c.pth", {SYNSETS[4]: 1.0})
    evaluated("imagenet_c", data, resume, tmp_path)
    errors = {r["severity"]: r["error"] for r in rows_of(tmp_path / "corruptions.csv")}
    assert errors == {"1": "100.000", "2": "0.000"}


def test_images_of_imagenet_c_are_not_resized(tmp_path):
    listed = draw(tmp_path / "data", {f"fog/1/{SYNSETS[2]}": 1})
    border = np.zeros((64, 64, 3), "uint8")
    border[0] = border[-1] = 255
    Image.fromarray(border).save(listed / f"fog/1/{SYNSETS[2]}/0.png")
    for name, seen in (("imagenet_c", True), ("imagenet_sketch", False)):
        data = build_data(DataConfig(name, str(listed)), AugmentConfig(), 64, with_train=False)
        image, _ = data.val[0]
        assert (image[0].amax() > 2) == seen


def test_published_weights_on_some_classes_of_imagenet(tmp_path):
    resume = checkpoint(tmp_path / "c.pth", {SYNSETS[0]: 9.0, SYNSETS[700]: 5.0})
    data = draw(tmp_path / "data", {SYNSETS[700]: 3, SYNSETS[20]: 1})
    row, predicted = evaluated("image_folder", data, resume, tmp_path)
    assert {*predicted.values()} == {SYNSETS[700]}
    assert row["top1"] == "75.000"


def test_corruptions(tmp_path, capsys):
    right, wrong = SYNSETS[4], SYNSETS[9]
    folders = {}
    for number, name in enumerate([*ALEXNET_ERRORS, *EXTRA_CORRUPTIONS]):
        for severity in range(1, 6):
            # the error is 100 % for the first corruption, 50 % for the second at severity 5
            folders[f"kind/{name}/{severity}/{wrong if number == 0 else right}"] = 1
            if number == 1 and severity == 5:
                folders[f"kind/{name}/{severity}/{wrong}"] = 1
    data = draw(tmp_path / "data", folders)
    resume = checkpoint(tmp_path / "c.pth", {right: 1.0})
    row, _ = evaluated("imagenet_c", data, resume, tmp_path)
    assert float(row["top1"]) == pytest.approx(100 * 90 / 96, abs=1e-3)
    errors = {(r["corruption"], r["severity"]): float(r["error"])
              for r in rows_of(tmp_path / "corruptions.csv")}  # fmt: skip
    assert len(errors) == 19 * 5
    assert errors["gaussian_noise", "3"] == 100
    assert errors["shot_noise", "5"] == 50
    assert sum(errors.values()) == 550
    mce = (100 / 0.886428 + 10 / 0.894468) / 15
    told = capsys.readouterr().out
    assert f"mCE: {mce:.2f}%" in told
    assert f"mean error of 19 corruptions: {110 / 19:.2f}%" in told


def test_mce_of_alexnet_is_100():
    errors = {name: {str(s): 100 * error for s in range(1, 6)} for name, error in
              ALEXNET_ERRORS.items()}  # fmt: skip
    assert mean_corruption_error(errors) == pytest.approx(100)
    errors["fog"].pop("1")
    assert mean_corruption_error(errors) is None


def test_real_labels(tmp_path, capsys):
    data = tmp_path / "data" / "val"
    for number, synset in enumerate([SYNSETS[0], SYNSETS[1], SYNSETS[2], SYNSETS[3]], start=1):
        draw(data, {synset: 1}, f"ILSVRC2012_val_{number:08d}.png")
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps([[0], [5, 8], [], [999], [0]]))
    # 8 is the most probable class; 0, 5 and three others are among the first five
    resume = checkpoint(tmp_path / "c.pth", dict(zip(
        (SYNSETS[i] for i in (8, 0, 5, 20, 30)), (5.0, 4.0, 3.0, 2.0, 1.0), strict=True)),
        SYNSETS[::-1])  # fmt: skip
    flags = ["--real_labels", str(labels), "--eval_data_path", str(data)]
    for synset in SYNSETS:
        (data / synset).mkdir(exist_ok=True)
    row, _ = evaluated("image_folder", data, resume, tmp_path, *flags)
    assert "with --real_labels on 3 images: top-1 33.33%  top-5 66.67%" in capsys.readouterr().out
    assert (row["top1"], row["top5"]) == ("33.333", "66.667")
    row, _ = evaluated("image_folder", data, resume, tmp_path, "--real_labels", "timm")
    assert (row["top1"], row["top5"]) == ("0.000", "0.000")
    assert RealLabels("timm").labels[:4] == [[], [970, 795], [230, 231], [809]]
    (data / SYNSETS[7]).rmdir()
    with pytest.raises(UserError, match="needs the 1000 classes of ImageNet"):
        evaluated("image_folder", data, resume, tmp_path, *flags)
    (data / SYNSETS[7]).mkdir()
    labels.write_text("[[1000]]")
    with pytest.raises(UserError, match="has labels outside 0 to 999"):
        evaluated("image_folder", data, resume, tmp_path, *flags)
    labels.write_text("[1]")
    with pytest.raises(UserError, match="is not a list of lists of labels"):
        evaluated("image_folder", data, resume, tmp_path, *flags)
    labels.write_text("[[1], [1], [1], [1]]")
    (data / SYNSETS[0] / "ILSVRC2012_val_00000001.png").rename(data / SYNSETS[0] / "other.png")
    with pytest.raises(UserError, match=r"other\.png is no validation image of ImageNet-1K"):
        evaluated("image_folder", data, resume, tmp_path, *flags)


@pytest.mark.parametrize(
    ("name", "folders", "message"),
    [
        (
            "imagenet_a",
            [SYNSETS[0]],
            f"has images in {SYNSETS[0]}, but the 200 classes of imagenet_a",
        ),
        ("imagenet_v2", ["1000"], "images in 1000, but the 1000 classes of imagenet_v2 are 0, 1"),
        ("imagenet_v2", [SYNSETS[0]], "but the 1000 classes of imagenet_v2 are 0, 1"),
        ("imagenet_v2", ["a/3", "b/3"], "holds several sets: give one of a/3, b/3"),
        ("imagenet_c", [f"{x}/fog/1/{SYNSETS[0]}" for x in "ab"], "holds several sets"),
        ("imagenet_c", [f"fog/6/{SYNSETS[0]}"], "is not CORRUPTION/SEVERITY/SYNSET"),
        ("imagenet_c", [SYNSETS[0]], "is not CORRUPTION/SEVERITY/SYNSET"),
        ("imagenet_r", [], "it has no such images"),
        ("imagenet_r", [""], "has images in no class folder"),
    ],
)
def test_other_folders(tmp_path, name, folders, message):
    data = draw(tmp_path / "data", dict.fromkeys(folders, 1))
    data.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        evaluated(name, data, checkpoint(tmp_path / "c.pth", {}), tmp_path)


def test_wrong_use(tmp_path):
    data = draw(tmp_path / "data", {SYNSETS[6]: 1, SYNSETS[5]: 1})
    with pytest.raises(UserError, match="imagenet_c/fog: give imagenet_c"):
        evaluated("imagenet_c/fog", data, checkpoint(tmp_path / "a.pth", {}), tmp_path)
    with pytest.raises(UserError, match="imagenet_sketch is for evaluation"):
        main.run(parse_args(["--data_set", "imagenet_sketch", "--data_path", str(data)]))
    resume = checkpoint(tmp_path / "c.pth", {}, ["ant", "bee"])
    with pytest.raises(UserError, match="not in the checkpoint"):
        evaluated("imagenet_sketch", data, resume, tmp_path)
    resume = checkpoint(tmp_path / "c.pth", {})
    (tmp_path / "results.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="has other columns than model,img_size,top1"):
        evaluated("imagenet_sketch", data, resume, tmp_path)
    for flag in ("--results_file", "--real_labels"):
        with pytest.raises(UserError, match=f"{flag}.* --eval true"):
            parse_args([flag, "x", "--data_path", str(data)])
