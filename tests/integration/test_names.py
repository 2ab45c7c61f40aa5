"""Class and file names that are not UTF-8, or that no font of ours has, through every output."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

import main
from config.command_line import parse_args
from inference.classifier import load_classifier
from inference.labels import drawable, printable
from inference.pictures import draw_confusion
from input_pipeline.folders import find_images
from runtime.errors import UserError
from tools import predict, visualize
from tools.web import classifier_page

from .conftest import ROOT

BYTE = os.fsdecode(b"\xff")
NAMES = [os.fsdecode(b"caf\xe9"), "\u732b", "$a_b$ <i>"]
ESCAPED = [r"caf\xe9", "\u732b", "$a_b$ <i>"]


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    root = tmp_path_factory.mktemp("names")
    for part in ("train", "val"):
        for label, name in zip("037", NAMES, strict=True):
            (root / part / name).mkdir(parents=True)
            for number, file in enumerate(sorted((digits / part / label).iterdir())[:8]):
                shutil.copy(file, root / part / name / f"{BYTE}{number}.png")
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    flags = ["--model", "hornet_atto_7x7", "--input_size", "32", "--num_workers", "0"]
    flags += ["--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--device", "cpu"]
    flags += ["--data_set", "image_folder", "--batch_size", "8", "--warmup_epochs", "0"]
    flags += ["--epochs", "1", "--data_path", str(data)]
    main.run(parse_args([*flags, "--output_dir", str(out)]))
    checkpoint = str(out / "checkpoint-0.pth")
    evaluated = [*flags, "--eval", "true", "--resume", checkpoint]
    main.run(parse_args([*evaluated, "--output_dir", str(out / "evaluated")]))
    return out


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_names_in_files_of_an_evaluation(run, data):
    folder = run / "evaluated"
    read = {"errors": "surrogateescape", "encoding": "utf-8"}
    predicted = rows((folder / "predictions.csv").read_text(**read))
    assert {row["file"] for row in predicted} == {str(file) for file in find_images([data / "val"])}
    per_class = rows((folder / "accuracy_per_class.csv").read_text(**read))
    assert {row["class"] for row in per_class} == {row["class"] for row in predicted} == {*NAMES}
    assert parse_args(["--config", str(run / "config.yaml")]).data.data_path == str(data)


@pytest.mark.slow
def test_names_in_predictions(run, data, tmp_path):
    folder = data / "val" / NAMES[0]
    command = [str(folder), "--checkpoint", str(run / "checkpoint-0.pth")]
    # as in any locale but C
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    start = [sys.executable, "-m", "tools.predict", "--csv", "--show-dir", str(tmp_path)]
    done = subprocess.run([*start, *command], env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(os.fsencode(folder / f"{BYTE}0.png")) == 3
    assert len(list(tmp_path.glob("*.png"))) == 8


def test_json_has_valid_text(run, data, capsys):
    command = [str(data / "val"), "--checkpoint", str(run / "checkpoint-0.pth"), "--json"]
    assert predict.main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    json.dumps(answer, ensure_ascii=False).encode()  # no lone surrogates
    found = {p["class"] for image in answer["images"] for p in image["predictions"]}
    assert found == {*ESCAPED}


@pytest.mark.slow
def test_names_in_pictures_and_the_report(run, data, recwarn):
    classifier = load_classifier(str(run / "checkpoint-0.pth"))
    assert drawable(classifier.labels) == ["$a_b$ <i>", r"caf\xe9", "#2"]
    figure = draw_confusion(classifier, find_images([data / "val"]))
    figure.canvas.draw()
    assert visualize.main(["report", str(run)]) == 0
    html = (run / "report.html").read_bytes().decode()  # valid UTF-8
    assert "<tr><th>#2<td>\u732b" in html
    assert "Glyph" not in " ".join(str(warning.message) for warning in recwarn)


def test_names_on_the_web_page(run):
    pytest.importorskip("gradio")
    classifier = load_classifier(str(run / "checkpoint-0.pth"))
    json.dumps(classifier_page(classifier, "c", []).get_config_file(), ensure_ascii=False).encode()


def test_names_are_printable():
    assert printable(os.fsdecode(b"a\xffb\nc\x00")) == r"a\xffb\nc\x00"
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"
    assert drawable(["caf\u00e9", "\u03b1\u0431", "\u732b", "a\tb"]) == [
        "caf\u00e9", "\u03b1\u0431", "#2", r"a\tb",
    ]  # fmt: skip


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("data_path: ~/data\noutput_dir: ~/runs/a\n")
    flat = parse_args(["--config", "~/recipe.yaml", "--resume", "~/c.pth"]).flat()
    assert [flat[n] for n in ("data_path", "output_dir", "resume")] == [
        f"{tmp_path}/data", f"{tmp_path}/runs/a", f"{tmp_path}/c.pth",
    ]  # fmt: skip
    with pytest.raises(UserError, match=f"folder {tmp_path} has no images"):
        find_images(["~"])


def test_wrong_arguments_of_tools_are_one_line(capsys):
    for command in (["--none"], ["a.jpg", "--checkpoint", "c.pth", "--topk", "x"]):
        assert predict.main(command) == 1
        line = capsys.readouterr().err
        assert line.startswith("tools.predict: error: ")
        assert line.count("\n") == 1
        assert line.endswith("; see --help\n")
    assert visualize.main(["curve"]) == 1
    assert "invalid choice: 'curve'" in capsys.readouterr().err
