"""tools.visualize: pictures and pages are written whole, mistakes are one line."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main
from cli import parse_args
from runtime.errors import UserError
from tools import visualize

GF = ["--checkpoint", "gf.pth", "--output", "a.png"]


@pytest.fixture
def trained(flags, tmp_path):
    out = tmp_path / "a run"
    main.run(parse_args([*flags, "--output_dir", str(out)]))
    return out


def save_gf(path):
    """A GF model that tells three classes."""
    torch.manual_seed(0)
    model = timm.create_model("hornet_atto_gf", num_classes=3, layer_scale_init_value=0.5)
    flags = {"model": "hornet_atto_gf", "input_size": 64}
    torch.save({"model": model.state_dict(), "args": flags}, path)


def run(capsys, *argv):
    status = visualize.main([str(argument) for argument in argv])
    return (status, *capsys.readouterr())


def test_every_picture(digits, tmp_path, capsys):
    weights = tmp_path / "gf.pth"
    save_gf(weights)
    image = next(digits.glob("val/0/*.png"))
    for what, *images in (
        ("field", digits / "val"), ("filters",), ("gates", image), ("cam", digits / "val"),
    ):  # fmt: skip
        output = tmp_path / f"{what}.png"
        status, told, errors = run(
            capsys, what, *images, "--checkpoint", weights, "--output", output
        )
        assert (status, told, errors) == (0, f"{output}\n", "")
        with Image.open(output) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_report_of_a_run(digits, trained, capsys):
    status, told, _ = run(capsys, "report", trained, "--images", digits / "val")
    assert (status, told) == (0, f"{trained / 'report.html'}\n")
    page = (trained / "report.html").read_text()
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,', page)) >= 5
    assert (
        "http"
        not in re.sub(r"base64,[^\"]*", "", page).replace("https", "http").split("<details>")[0]
    )
    assert "<h1>a run</h1>" in page
    # of two runs beside each other
    other = trained.with_name("other")
    other.mkdir()
    (other / "log.txt").write_text((trained / "log.txt").read_text())
    output = trained.with_name("curves.png")
    assert run(capsys, "curves", trained, other, "--output", output)[0] == 0


def test_confusions_are_counted(digits, trained, tmp_path):
    classifier = visualize.load_classifier(str(next(trained.glob("checkpoint-1.pth"))))
    files = visualize.find_images([str(digits / "val")])
    figure = visualize.draw_confusion(classifier, files)
    matrix = figure.subfigs[0].axes[0]
    places = [(*map(int, text.get_position()), int(text.get_text())) for text in matrix.texts]
    cells = {(row, column): count for column, row, count in places}
    assert sum(cells.values()) == len(files) == 33
    rows = [sum(n for (row, _), n in cells.items() if row == label) for label in range(3)]
    assert rows == [11, 11, 11]
    with torch.no_grad():
        inputs = visualize.examples_of(classifier, files).inputs
        found = [classifier.classes[label] for label in classifier.model(inputs).argmax(1)]
    right = sum(file.parent.name == name for file, name in zip(files, found, strict=True))
    assert sum(n for (row, column), n in cells.items() if row == column) == right


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    save_gf(folder / "gf.pth")
    for name, model in (("7x7", "hornet_atto_7x7"), ("resnet", "resnet18")):
        state = {"model": timm.create_model(model).state_dict(), "args": {"model": model}}
        torch.save(state, folder / f"{name}.pth")
    (folder / "empty").mkdir()
    (folder / "a.jpg").write_text("no image")
    Image.new("RGB", (64, 64)).save(folder / "x.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curves", "none", "--output", "a.png"], "none is no folder of a run"),
        (["report", "."], ". is no folder of a run"),
        (["filters", "--checkpoint", "none.pth", "--output", "a.png"], "none.pth does not exist"),
        (["filters", "--checkpoint", "gf.pth", "--output", "a.pdf"], "give FILE.png"),
        (["filters", "--checkpoint", "gf.pth", "--output", "no/a.png"], "no is no folder"),
        (["filters", "--checkpoint", "7x7.pth", "--output", "a.png"], "has no global filters"),
        (["filters", "--checkpoint", "resnet.pth", "--output", "a.png"], "is no HorNet"),
        (["cam", "empty", *GF], "holds no images"),
        (["cam", "a.jpg", *GF], "a.jpg cannot be read"),
        (
            ["cam", "x.png", "--checkpoint", "gf.pth", "--output", "a.png", "--count", "0"],
            "at least 1",
        ),
        (["confusion", "x.png", *GF], "knows no class"),
    ],
)
def test_mistakes_are_one_line(odd_files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(odd_files)
    before = sorted(odd_files.rglob("*"))
    status, _, errors = run(capsys, *arguments)
    assert status == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert sorted(odd_files.rglob("*")) == before


def test_images_of_a_run_are_those_held_out(digits, flags, tmp_path):
    config = [*flags, "--data_path", str(digits / "train"), "--val_fraction", "0.25"]
    out = tmp_path / "run"
    main.run(parse_args([*config, "--epochs", "1", "--output_dir", str(out)]))
    saved = visualize.load_classifier(str(out / "checkpoint-0.pth")).flags
    files = visualize.images_of(saved)
    assert len(files) == 3 * 6
    main.run(parse_args([*config, "--eval", "true", "--resume", str(out / "checkpoint-0.pth"),
                         "--output_dir", str(tmp_path / "evaluated")]))  # fmt: skip
    told = (tmp_path / "evaluated/predictions.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in told} == {str(file) for file in files}


@pytest.mark.parametrize("lost", [{"data_set": "CIFAR"}, {"data_path": "/nowhere"}])
def test_lost_images_of_a_run_are_asked_for(lost):
    with pytest.raises(UserError, match="give --images FOLDER"):
        visualize.images_of({"data_set": "image_folder", "data_path": ".", **lost})
