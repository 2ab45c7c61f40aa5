"""The page of tools.web, and the one of a run, in a real browser."""

import csv
import dataclasses
import io
import os
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from inference import insight, pictures
from inference.classifier import load_classifier
from inference.prediction import predictions
from input_pipeline.folders import find_images
from runtime.logging import read_log
from tests.integration.conftest import ROOT
from tools import visualize, web


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A classifier of ten classes that has learnt nothing, and two of whose names are the same."""
    torch.manual_seed(0)
    model = timm.create_model("hornet_atto_7x7", num_classes=10, layer_scale_init_value=0.5)
    flags = {"model": "hornet_atto_7x7", "input_size": 64}
    classes = ["crane", *"bcdefghi", "crane"]
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save({"model": model.state_dict(), "args": flags, "classes": classes}, path)
    return path


@contextmanager
def served(folder, *flags):
    """The address of a page, served for as long as the body takes, with its files in a folder."""
    command = [sys.executable, "-u", "-m", "tools.web", *map(str, flags)]
    # a proxy that is not there, as of a cluster, which must not be asked for the page itself
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield next(filter(None, map(re.compile(r"http://[\d.:]+").search, server.stdout)))[0]
            assert list(folder.glob("hornet-web-*/*"))
        finally:
            server.terminate()
            server.wait(timeout=60)
    assert not list(folder.glob("hornet-web-*"))  # what people dropped is gone


@pytest.fixture
def address(weights, digits, tmp_path):
    pytest.importorskip("gradio")
    with served(tmp_path, "--checkpoint", weights, "--examples", digits / "val") as address:
        yield address


def titled(tab, title):
    """Waits until the browser shows that title, which a script of the page sets."""
    tab.wait_for_function("title => document.title == title", arg=title)


def drop(tab, file):
    """Lets go of a file over the page, as a hand does."""
    data = tab.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
            return data;
        }""",
        [list(file.read_bytes()), file.name],
    )
    tab.locator("button", has_text="Drop Image Here").dispatch_event("drop", {"dataTransfer": data})


def shown_picture(tab, label):
    """The pixels under a label, once they have come."""
    block = tab.locator(".block", has=tab.get_by_text(label, exact=True))
    source = block.locator("img").get_attribute("src", timeout=20_000)
    return np.asarray(Image.open(io.BytesIO(tab.request.get(source).body())))


def test_answer_is_that_of_predict(weights, digits):
    classifier = load_classifier(str(weights))
    file = next(digits.glob("val/3/*.png"))
    shares, picture = web.answer(classifier, file)
    (found,) = predictions(classifier, [file], torch.device("cpu"), topk=3, batch_size=1)
    top = sorted(shares, reverse=True)[:3]
    assert found.classes == [
        (classifier.labels[shares.index(share)], pytest.approx(share)) for share in top
    ]
    # of each class its own heat over the same pixels, whose blend is undone here
    image = classifier.inputs([file])
    for label in (1, 2):
        _, picture = web.answer(classifier, file, label)
        assert picture.size == (web.SHOWN_SIDE, web.SHOWN_SIDE)
        heat = insight.grad_cam(classifier.model, image, torch.tensor([label]))[0].numpy()
        pixels = pictures.examples_of(classifier, [file]).pixels[0]
        blend = 0.55 * pixels + 0.45 * matplotlib.colormaps["jet"](heat)[..., :3]
        small = np.asarray(picture.resize((64, 64), Image.Resampling.BOX)) / 255
        assert np.abs(small - blend).mean() < 0.01


def test_names_are_told_apart():
    assert web._distinct(["a", "b", "a"]) == ["a (0)", "b", "a (2)"]
    assert len(set(web._distinct(["a", "a", "a (0)"]))) == 3


def test_own_images_are_for_their_owner(digits, tmp_path):
    def chosen(**flags):
        return len(web._examples(Namespace(**flags), lambda: find_images([digits / "val"])))

    assert chosen(examples=None, host="127.0.0.1") == 10
    assert chosen(examples=None, host="0.0.0.0") == 0
    assert chosen(examples=digits / "train", host="0.0.0.0") == 10
    none = Namespace(examples=None, host="localhost")
    assert web._examples(none, lambda: find_images([tmp_path])) == []


def test_examples_are_the_evaluation_images_of_the_run(weights, digits, monkeypatch):
    flags = {"data_set": "image_folder", "data_path": str(digits)}
    classifier = dataclasses.replace(load_classifier(str(weights)), flags=flags)
    monkeypatch.setattr(web, "classifier_of", lambda *_, **__: classifier)
    monkeypatch.setattr(web, "classifier_page", lambda classifier, source, examples: examples)
    own = web._classifier_page(Namespace(examples=None, host="127.0.0.1", checkpoint="a.pth"))
    assert len(own) == 10
    assert {file.parents[1] for file in own} == {digits / "val"}


@pytest.mark.slow
def test_an_image_dropped_on_the_page(tab, address, weights, digits, tmp_path):
    classifier = load_classifier(str(weights))
    file = next(digits.glob("val/7/*.png"))
    shares, picture = web.answer(classifier, file)
    names = web._distinct(classifier.labels)
    assert names[0] == "crane (0)"
    order = sorted(range(10), key=lambda label: -shares[label])[:5]

    tab.goto(address)
    titled(tab, "hornet_atto_7x7, 10 classes · small.pth")
    drop(tab, file)
    small = tab.locator(".image-frame img").first.evaluate_handle("image => image")
    tab.wait_for_function("image => image.style.imageRendering == 'pixelated'", arg=small)
    first, second = (names[label] for label in order[:2])
    np.testing.assert_array_equal(shown_picture(tab, f"where it looks for {first}"), picture)
    bars = {
        bar.get_attribute("aria-label"): float(bar.get_attribute("value"))
        for bar in tab.locator("meter").all()
    }
    assert bars == pytest.approx({names[label]: shares[label] for label in order})

    tab.get_by_test_id(f"{second}-confidence-set").click()
    _, other = web.answer(classifier, file, order[1])
    assert np.abs(np.asarray(other) - np.asarray(picture, dtype=float)).max() > 20
    picture = other
    np.testing.assert_array_equal(shown_picture(tab, f"where it looks for {second}"), picture)

    # of fast clicks the last one stays
    for label in (order[2], order[3], order[0]):
        tab.get_by_test_id(f"{names[label]}-confidence-set").click()
    _, picture = web.answer(classifier, file)
    np.testing.assert_array_equal(shown_picture(tab, f"where it looks for {first}"), picture)
    tab.wait_for_timeout(1000)
    assert tab.get_by_text(f"where it looks for {first}", exact=True).is_visible()

    tab.reload()
    broken = tmp_path / "broken.png"
    broken.write_bytes(file.read_bytes()[:60])
    drop(tab, broken)
    tab.get_by_text("image broken.png cannot be read").wait_for(timeout=20_000)

    tab.reload()
    tab.locator(".gallery-item").last.click()  # an example
    tab.get_by_text(re.compile("where it looks for .+")).wait_for(timeout=20_000)
    assert {re.match(r"[a-z]+:(//[^/]*)?", url)[0] for url in tab.addresses} <= {address, "data:"}
    assert tab.mistakes == []


@pytest.fixture(scope="module")
def run_with_report(weights, digits, tmp_path_factory):
    """A run with long and strange names, and an epoch without an evaluation."""
    run = tmp_path_factory.mktemp("runs") / f"a <b>run, {60 * 'x'}"
    run.mkdir()
    saved = torch.load(weights, weights_only=True)
    saved["args"]["data_path"] = "/" + 60 * "path"
    saved["classes"][1:3] = ["<i>" + 100 * "w", "鶴"]
    torch.save(saved, run / "checkpoint-0.pth")
    (run / "log.txt").write_text(
        '{"epoch": 0, "train_loss": 1.5}\n'
        '{"epoch": 1, "train_loss": null, "test_acc1": 12.5, "note": "a, \\"b\\"\\nc"}\n'
    )
    assert visualize.main(["report", str(run), "--images", str(digits / "val")]) == 0
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.slow
def test_report_of_a_run_fits_phones_and_wide_screens(tab, run_with_report, width, scheme):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    tab.goto((run_with_report / "report.html").as_uri())
    tab.locator("summary").click()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    widths = tab.locator("img").evaluate_all(
        "images => images.map(image => [image.naturalWidth, image.getBoundingClientRect().width])"
    )
    assert len(widths) >= 5
    assert min(natural for natural, _ in widths) > 200
    assert max(shown for _, shown in widths) < width
    page, text = tab.evaluate(
        "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour))) for colour in (page, text)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    assert tab.locator("h1").inner_text() == run_with_report.name
    for link in tab.locator("nav a").all():
        assert tab.locator(link.get_attribute("href")).is_visible()
    assert {Path(url).name for url in tab.addresses if not url.startswith("data:")} == {
        "report.html"
    }
    assert tab.mistakes == []


@pytest.mark.slow
def test_report_of_a_run_has_its_log_as_csv(tab, run_with_report):
    tab.goto((run_with_report / "report.html").as_uri())
    with tab.expect_download() as found:
        tab.get_by_text("Download the log (CSV)").click()
    with Path(found.value.path()).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    log = read_log(run_with_report)
    assert len(rows) == len(log) == 2
    for row, record in zip(rows, log, strict=True):
        told = {key: "" if value is None else str(value) for key, value in record.items()}
        assert row == dict.fromkeys(row, "") | told
    assert found.value.suggested_filename.endswith("x-log.csv")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--port", "99999"], "--port 99999: no page can be served there"),
        (["--host", "8.8.8.8"], "--host 8.8.8.8 --port any: no page"),
        (["--examples", "nowhere"], "--examples nowhere is not a folder"),
        (["--input-size", "0"], "0: give pixels, as in 224 or 224x320"),
    ],
)
def test_mistakes_are_one_line(weights, capsys, wrong, told):
    assert web.main(["--checkpoint", str(weights), *wrong]) == 1
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1
