"""tools.visualize: pictures and pages are written whole, mistakes are one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import main
from config.command_line import parse_args
from config.flags import ModelConfig
from inference import insight, pictures, report
from inference.classifier import Classifier, Preprocessing, load_classifier
from input_pipeline.folders import find_images
from runtime.curves import PANELS, draw_curves
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
    facts = dict(re.findall(r"<dt>([^<]+)<dd>([^<]+)", page))
    assert facts["epochs"] == "2"
    assert facts["hardware"].endswith(", 1 process")
    assert re.fullmatch(r"0:0\d:\d\d", facts["time"])
    assert float(facts["images per second"].removesuffix(" in training").replace(",", "")) > 0
    changed = page.split("<details>")[0].split('id="flags"')[1]
    assert "<tr><th>batch_size<td>8<td>64" in changed
    assert "<th>seed<" not in changed
    assert "<tr><th>seed<td>0" in page.split("<details>")[1]
    # of two runs beside each other
    other = trained.with_name("other")
    other.mkdir()
    (other / "log.txt").write_text((trained / "log.txt").read_text())
    output = trained.with_name("curves.png")
    assert run(capsys, "curves", trained, other, "--output", output)[0] == 0


def test_confusions_are_counted(digits, trained, tmp_path):
    classifier = load_classifier(str(next(trained.glob("checkpoint-1.pth"))))
    files = find_images([str(digits / "val")])
    figure = pictures.draw_confusion(classifier, files)
    matrix = figure.subfigs[0].axes[0]
    places = [(*map(int, text.get_position()), int(text.get_text())) for text in matrix.texts]
    cells = {(row, column): count for column, row, count in places}
    assert sum(cells.values()) == len(files) == 33
    rows = [sum(n for (row, _), n in cells.items() if row == label) for label in range(3)]
    assert rows == [11, 11, 11]
    with torch.no_grad():
        inputs = pictures.examples_of(classifier, files).inputs
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
        (["curves", "none", "--output", "a.png"], "none is not the folder of a run"),
        (["report", "."], "is not the folder of a run: it has no log.txt"),
        (["filters", "--checkpoint", "none.pth", "--output", "a.png"], "none.pth does not exist"),
        (["filters", "--checkpoint", "gf.pth", "--output", "a.pdf"], "give FILE.png"),
        (["filters", "--checkpoint", "gf.pth", "--output", "no/a.png"], "no is not a folder"),
        (["filters", "--checkpoint", "7x7.pth", "--output", "a.png"], "has no global filters"),
        (["filters", "--checkpoint", "resnet.pth", "--output", "a.png"], "is not a HorNet"),
        (["cam", "empty", *GF], "has no images"),
        (["cam", "a.jpg", *GF], "a.jpg cannot be read"),
        (
            ["cam", "x.png", "--checkpoint", "gf.pth", "--output", "a.png", "--count", "0"],
            "at least 1",
        ),
        (["confusion", "x.png", *GF], "is not one of the model"),
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


def test_unreadable_images_are_skipped(odd_files, monkeypatch, capsys):
    monkeypatch.chdir(odd_files)
    command = ["cam", "a.jpg", "x.png", "--checkpoint", "gf.pth", "--output", "skips.png"]
    status, _, errors = run(capsys, *command)
    assert (status, Path("skips.png").is_file()) == (0, True)
    assert errors.startswith("skipped: image a.jpg cannot be read")


def test_images_of_a_run_are_those_held_out(digits, flags, tmp_path):
    config = [*flags, "--data_path", str(digits / "train"), "--val_fraction", "0.25"]
    out = tmp_path / "run"
    main.run(parse_args([*config, "--epochs", "1", "--output_dir", str(out)]))
    saved = load_classifier(str(out / "checkpoint-0.pth")).flags
    files = report.images_of(saved)
    assert 9 <= len(files) <= 27  # of 72
    main.run(parse_args([*config, "--eval", "true", "--resume", str(out / "checkpoint-0.pth"),
                         "--output_dir", str(tmp_path / "evaluated")]))  # fmt: skip
    told = (tmp_path / "evaluated/predictions.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in told} == {str(file) for file in files}


@pytest.mark.parametrize("lost", [{"data_set": "CIFAR"}, {"data_path": "/nowhere"}])
def test_lost_images_of_a_run_are_asked_for(lost):
    with pytest.raises(UserError, match="give --images FOLDER"):
        report.images_of({"data_set": "image_folder", "data_path": ".", **lost})


class Brightness(nn.Module):
    """Surer of `dark` the darker an image is; a HorNet by name only."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack((-mean, mean, torch.full_like(mean, -99.0)), 1)


def test_worst_confusions_are_the_surest_mistakes(tmp_path):
    files = []
    for name, grey in (
        ("bright", 30),
        ("bright", 90),
        ("bright", 250),
        ("dark", 10),
        ("dark", 160),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        files.append(tmp_path / name / f"{grey}.png")
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(files[-1])
    view = Preprocessing(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    classes = ["dark", "bright", "a$^$b_never"]  # no formula
    classifier = Classifier(Brightness(), ModelConfig(model="a"), classes, view)
    figure = pictures.draw_confusion(classifier, files)
    matrix, *shown = (axes for part in figure.subfigs for axes in part.axes)
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted", "true")
    assert matrix.get_title() == "accuracy 40.00% of 5 images"
    assert [tick.get_text() for tick in matrix.get_yticklabels()] == ["dark", "bright"]
    np.testing.assert_allclose(matrix.images[0].get_array(), [[1 / 2, 1 / 2], [2 / 3, 1 / 3]])
    shown = [axes for axes in shown if axes.images]
    assert [axes.images[0].get_array()[0, 0, 0] * 255 for axes in shown] == pytest.approx(
        [30, 90, 160], abs=0.5
    )
    assert "dark" in shown[0].get_title().splitlines()[0]
    assert shown[2].get_title().splitlines()[1] == "(true dark)"


def test_curves_are_those_of_the_logs(flags, digits, tmp_path):
    runs = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "_z"]
    main.run(parse_args([*flags, "--model_ema", "true", "--model_ema_eval", "true",
                         "--mixup", "0", "--cutmix", "0",
                         "--output_dir", str(runs[0])]))  # fmt: skip
    for run, accuracy in zip(runs[1:], (12.5, 50.0), strict=True):
        run.mkdir(parents=True)
        lines = [{"epoch": 0, "test_acc1": accuracy}, {"epoch": "a"}, {"epoch": 1, "test_loss": 2}]
        (run / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = draw_curves(runs).axes
    log = [json.loads(line) for line in (runs[0] / "log.txt").read_text().splitlines()]
    shown = {title: series for title, series in PANELS.items() if title != "mAP (%)"}
    assert [axes.get_title() for axes in panels] == [*shown]
    for axes, series in zip(panels, shown.values(), strict=True):
        for line, key in zip(axes.lines, series, strict=False):
            np.testing.assert_allclose(line.get_ydata(), [record[key] for record in log])
            np.testing.assert_allclose(line.get_xdata(), [0, 1])
    others = panels[1].lines[len(PANELS["top-1 (%)"]) :]
    assert [list(line.get_ydata()) for line in others] == [[12.5], [50.0]]
    labels = [text.get_text() for text in panels[1].get_legend().get_texts()]
    assert labels[-2:] == [f"{run}: test" for run in runs[1:]]
    assert f"{runs[0]}: EMA" in labels


def test_titles_of_pictures(tmp_path):
    save_gf(tmp_path / "gf.pth")
    classifier = load_classifier(str(tmp_path / "gf.pth"), input_size=128)
    inputs = torch.randn(3, 3, 128, 128)
    examples = pictures.Examples(inputs, np.zeros((3, 128, 128, 3)), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        shares = classifier.model(inputs).softmax(1)
    shown = pictures.draw_cam(classifier, examples).axes[:3]
    for index, axes in enumerate(shown):
        found = int(shares[index].argmax())
        first, *rest = axes.get_title().splitlines()
        assert first == f"{found} {shares[index].max():.0%}"
        assert rest == ([] if found == index else [f"(true {index})"])
        cam = insight.grad_cam(classifier.model, inputs[index : index + 1])[0]
        np.testing.assert_allclose(axes.images[1].get_array(), cam, atol=1e-5)
    gates = pictures.draw_gates(classifier, examples)
    rows = [axes.get_title() for axes in gates.axes if axes.get_title().startswith("stages")]
    assert [row[:8] for row in rows] == ["stages.0", "stages.1", "stages.2", "stages.3"]
    maps = insight.gate_maps(classifier.model, inputs[:1])
    drawn = [axes.images[0].get_array() for axes in gates.axes if "alpha" in axes.get_title()]
    of_model = [gate[0] for orders in maps.values() for gate in orders]
    for ours, theirs in zip(drawn, of_model, strict=True):
        np.testing.assert_allclose(ours, theirs)
    filters = pictures.draw_filters(classifier)
    rows = [axes.get_title(loc="left") for axes in filters.axes if axes.get_title(loc="left")]
    assert [row.partition(":")[0] for row in rows] == [
        *2 * ["stages.2.0.gnconv.dwconv"], *2 * ["stages.3.0.gnconv.dwconv"],
    ]  # fmt: skip


def test_report_is_of_the_best_checkpoint_and_survives_a_bad_image(digits, trained, tmp_path):
    shutil.copytree(digits / "val", tmp_path / "val")
    next(tmp_path.glob("val/3/*.png")).write_bytes(b"no image")
    page = report.report(trained, None, tmp_path / "val", 4)
    assert "checkpoint-best.pth" in page
    assert "32 of the 33" in page
    log = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert f"{max(record['test_acc1'] for record in log):.2f} %" in page
    named = trained.rename(trained.with_name("a <b>run"))
    assert "<h1>a &lt;b&gt;run</h1>" in report.report(named, None, tmp_path / "val", 4)
    trained = named
    other = report.report(trained, str(trained / "checkpoint-0.pth"), tmp_path / "val", 4)
    assert "checkpoint-0.pth" in other


@pytest.mark.parametrize(
    ("timing", "facts"),
    [
        (None, {}),  # of an old run
        ('{"epoch": 0, "sec', {}),
        ('{"epoch": 7, "seconds": 9, "device": "H", "processes": 8}\n', {}),  # since gone back
        (
            '{"epoch": 0, "seconds": 3600, "train_images_per_s": 1500, "device": "H", '
            '"processes": 8}\n',
            {
                "hardware": "H, 8 processes",
                "time": "at least 1:00:00",
                "images per second": "1,500.0 in training",
            },
        ),
        (
            '{"epoch": 0, "seconds": 9, "train_images_per_s": 5, "device": "C", "processes": 1}\n'
            '{"epoch": 1, "seconds": 8, "train_images_per_s": 7, "device": "C", "processes": 1}\n',
            {
                "hardware": "C, 1 process",
                "time": "0:00:17",
                "images per second": "6.0 in training",
            },
        ),
        (  # resumed elsewhere, inside an epoch
            '{"epoch": 0, "seconds": 86000, "train_images_per_s": 9, "device": "H", '
            '"processes": 2}\n{"epoch": 1, "seconds": 401.4, "device": "C", "processes": 1}\n',
            {
                "hardware": "H, 2 processes; C, 1 process",
                "time": "at least 1 day, 0:00:01",
                "images per second": "9.0 in training",
            },
        ),
    ],
)
def test_only_recorded_timing_is_told(tmp_path, timing, facts):
    if timing is not None:
        (tmp_path / "timing.txt").write_text(timing)
    assert report._timing(tmp_path, [{"epoch": 0}, {"epoch": 1}]) == facts


def test_flags_without_a_default_are_told():
    page = report._flags({"lr": 0.004, "gone": "<1>"})
    assert "<tbody><tr><th>gone<td>&lt;1&gt;<td></table>" in page
    assert "<tr><th>lr<td>0.004" in page.split("<details>")[1]
    assert report._flags({}) == "<p>The checkpoint has none.</p>"


@pytest.mark.parametrize(
    "strange",
    [
        {"data_path": 5}, {"data_path": None}, {"data_path": ["a"]}, {"data_path": 5000 * "a"},
        {"eval_data_path": 5}, {"max_images": "many"}, {"val_fraction": []}, {"data_set": 3},
    ],
)  # fmt: skip
def test_strange_flags_of_a_checkpoint_are_no_traceback(strange, digits):
    with pytest.raises(UserError, match="give --images FOLDER"):
        report.images_of({"data_set": "image_folder", "data_path": str(digits), **strange})


def test_eval_data_path_counts_as_in_training(digits, tmp_path):
    """For image folders only."""
    flags = {"data_path": str(digits), "eval_data_path": str(digits / "train")}
    assert "val" in str(report.images_of({**flags, "data_set": "IMNET"})[0])
    assert "train" in str(report.images_of({**flags, "data_set": "image_folder"})[0])


def test_images_are_spread_over_the_classes(digits):
    files = find_images([str(digits / "val")])
    assert [file.parent.name for file in pictures.spread(files, 6)] == [
        "0",
        "0",
        "3",
        "3",
        "7",
        "7",
    ]
    assert pictures.spread(files, 1000) == files
