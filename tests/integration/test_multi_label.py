"""Images with any number of classes each: data, losses, metrics, and who uses the network."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

import multi_label
from config.command_line import parse_args
from evaluation import Views
from inference.classifier import load_classifier
from inference.convert import convert
from inference.export import export
from inference.exported import Exported
from inference.prediction import predictions
from inference.targets import Options
from input_pipeline.label_files import list_labelled
from main import run
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError
from runtime.logging import read_log
from tools import visualize, web
from training.loss import build_loss

CLASSES = ["blue", "green", "red"]
FLAGS = [
    *("--data_set", "multi_label", "--model", "hornet_atto_7x7", "--device", "cpu"),
    *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--num_workers", "0"),
    *("--input_size", "32", "--batch_size", "32", "--lr", "3e-3", "--layer_scale_init_value", "1"),
    *("--warmup_epochs", "1", "--loss", "bce", "--mixup", "0", "--cutmix", "0", "--aa", "none"),
    *("--color_jitter", "0", "--reprob", "0", "--smoothing", "0", "--log_interval", "5"),
]


def config_of(*flags):
    return parse_args([str(flag) for flag in (*FLAGS, *flags)])


def draw(folder, names, seed):
    """Write images with a square of each of some colours; return file -> colours."""
    random, labels = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        image = Image.new("RGB", (40, 40), "black")
        labels[f"{folder.name}/{name}.png"] = own = []
        for place, colour in enumerate(CLASSES):
            if random.random() < 0.4:
                own.append(colour)
                left, top = random.integers(0, 6), 13 * place
                ImageDraw.Draw(image).rectangle((left, top, left + 30, top + 12), colour)
        image.save(folder / f"{name}.png")
    return labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train.csv with the names of the classes, val.csv with a column for each, and the images."""
    root = tmp_path_factory.mktemp("colours")
    with (root / "train.csv").open("w", newline="") as file:
        lines = draw(root / "images", range(160), 0).items()
        csv.writer(file).writerows([("file", "labels"), *((n, ";".join(own)) for n, own in lines)])
    with (root / "val.csv").open("w", newline="") as file:
        lines = draw(root / "more", range(50), 1).items()
        csv.writer(file).writerows(
            [("file", *CLASSES), *((n, *(int(c in own) for c in CLASSES)) for n, own in lines)]
        )
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    run(config_of("--data_path", folder, "--output_dir", output, "--epochs", 8))
    return output


def test_training_learns_all_classes_of_an_image(trained):
    last = read_log(trained)[-1]
    assert last["test_mAP"] > 85  # chance is 40
    assert last["max_accuracy"] == max(record["test_mAP"] for record in read_log(trained))
    assert "train_class_acc" not in last
    assert (trained / "curves.png").is_file()
    assert visualize.main(["report", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert f"<dt>best mAP<dd>{last['max_accuracy']:.2f} %" in page
    assert 'alt="mAP (%)"' in page


@pytest.mark.slow
def test_a_resumed_run_is_the_same(trained, folder, tmp_path):
    flags = ["--data_path", folder, "--output_dir", tmp_path, "--epochs", 8]
    run(config_of(*flags, "--resume", trained / "checkpoint-5.pth"))
    assert (tmp_path / "log.txt").read_text() == "".join(
        (trained / "log.txt").read_text().splitlines(keepends=True)[-2:]
    )


def test_evaluation_writes_what_is_told(trained, folder, tmp_path, capsys):
    (folder / "more" / "7.png").write_bytes(b"no image")
    flags = ["--eval", "true", "--resume", trained / "checkpoint-7.pth", "--output_dir", tmp_path]
    run(config_of("--data_path", folder, *flags))
    draw(folder / "more", range(50), 1)
    assert "on 49 images: mAP" in capsys.readouterr().out
    predictions = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(predictions) == 49
    truth = {line["file"]: line for line in csv.DictReader((folder / "val.csv").open())}
    labels, shares = [], []
    for line in predictions:
        own = truth[line["file"].removeprefix(f"{folder}/")]
        labels.append([int(own[c]) for c in CLASSES])
        shares.append([float(line[c]) for c in CLASSES])
        assert line["labels"] == ";".join(c for c in CLASSES if own[c] == "1")
        assert line["predicted"] == ";".join(c for c in CLASSES if float(line[c]) >= 0.5)
    labels, shares = np.array(labels), np.array(shares)
    per_class = list(csv.DictReader((tmp_path / "metrics_per_class.csv").open()))
    found = precision_recall_fscore_support(
        labels, shares >= 0.5, average=None, zero_division=np.nan
    )
    for index, line in enumerate(per_class):
        values = [float(line[name]) for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose(values, 100 * np.array(found)[:3, index], atol=0.01)
        average = average_precision_score(labels[:, index], shares[:, index])
        assert float(line["AP"]) == pytest.approx(100 * average, abs=0.2)  # of rounded numbers
        assert int(line["images"]) == labels[:, index].sum()


def test_views_average_probabilities(trained, folder, capsys):
    flags = ["--eval", "true", "--resume", trained / "checkpoint-7.pth", "--tta", "flip"]
    run(config_of("--data_path", folder, *flags))
    assert "on 50 images: mAP" in capsys.readouterr().out
    model = load_classifier(str(trained / "checkpoint-7.pth")).model
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = Views(model, ["flip"], 32, is_multi_label=True)(images).sigmoid()
        expected = (model(images).sigmoid() + model(images.flip(3)).sigmoid()) / 2
    torch.testing.assert_close(found, expected)


def test_predictions_and_exports_are_probabilities_of_each_class(trained, folder, tmp_path):
    classifier = load_classifier(str(trained / "checkpoint-7.pth"))
    files = sorted((folder / "more").iterdir())[:6]
    with torch.no_grad():
        expected = classifier.model(classifier.inputs(files)).sigmoid()
    found = [*predictions(classifier, files, torch.device("cpu"), 3, 4)]
    for one, row in zip(found, expected, strict=True):
        assert dict(one.classes) == pytest.approx(dict(zip(CLASSES, row.tolist(), strict=True)))
    shares, _ = web.answer(classifier, files[0])
    assert shares == pytest.approx(expected[0].tolist())
    export(classifier, tmp_path / "model.onnx", Options())
    assert Exported(tmp_path / "model.onnx").facts.multi_label
    exported = load_classifier(str(tmp_path / "model.onnx"))
    again = [*predictions(exported, files, torch.device("cpu"), 3, 4)]
    for one, other in zip(found, again, strict=True):
        assert dict(other.classes) == pytest.approx(dict(one.classes), abs=1e-5)
    convert(str(trained / "checkpoint-7.pth"), tmp_path / "folder")
    assert load_classifier(str(tmp_path / "folder")).multi_label
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"  # as transformers calls it


def test_metrics_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 5, generator=generator).round(decimals=1)  # with ties
    labels = (torch.rand(60, 5, generator=generator) < 0.3).float()
    labels[:, 2] = 0  # a class that no image has
    labels[8] = -1  # unreadable

    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            return images[:, 0, 0] * self.one

    batches = [(logits[k : k + 16, None, None], labels[k : k + 16]) for k in range(0, 60, 16)]
    metrics, rows = multi_label.evaluate(Says(), batches, SINGLE_PROCESS)
    readable = torch.arange(60) != 8
    truth, scores = labels[readable].numpy(), logits[readable].numpy()
    have = [0, 1, 3, 4]
    guesses = scores >= 0
    average = average_precision_score(truth[:, have], scores[:, have], average="macro")
    assert metrics["mAP"] == pytest.approx(100 * average)
    assert metrics["f1_micro"] == pytest.approx(100 * f1_score(truth, guesses, average="micro"))
    macro = f1_score(truth[:, have], guesses[:, have], average="macro")
    assert metrics["f1_macro"] == pytest.approx(100 * macro)
    loss = torch.nn.BCEWithLogitsLoss()(logits[readable], labels[readable])
    assert metrics["loss"] == pytest.approx(float(loss))
    assert (metrics["images"], metrics["unreadable"]) == (59, 1)
    torch.testing.assert_close(rows[readable, 1], logits[readable])


def test_large_and_undefined_logits_have_an_order():
    labels = torch.tensor([[1.0, 0, 1]]).T
    # their probabilities are all 1 in float32
    precision = multi_label.average_precisions(labels, torch.tensor([[25.0, 20, 30]]).T)
    assert precision.item() == 1
    precision = multi_label.average_precisions(labels, torch.tensor([[2.0, 1, float("nan")]]).T)
    assert precision.item() == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_smoothing_moves_each_label_towards_a_half(kind):
    config = config_of("--loss", kind).loss
    logits, labels = torch.randn(4, 3), torch.tensor([[1.0, 0, 1]]).expand(4, 3)
    smoothed = torch.where(labels > 0, 0.9, 0.1)
    found = build_loss(config, 0.2, mixes=False)(logits, labels)
    torch.testing.assert_close(found, build_loss(config, 0.0, mixes=True)(logits, smoothed))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither train.csv nor train.json"),
        ({"train.csv": "file,labels\n", "train.json": "{}"}, "has both train.csv and train.json"),
        ({"train.csv": ""}, "its header needs two columns"),
        ({"train.csv": "file,labels\n"}, "names no images"),
        ({"train.csv": "file,labels\na.png,\n"}, "no image has a label"),
        ({"train.csv": "file,labels\na.png,x\n"}, "there is no file"),
        ({"train.csv": "file,labels\nb.png,x\nb.png,y\n"}, "line 3: b.png occurs a second time"),
        ({"train.csv": "file,labels\nb.png\n"}, "line 2: 1 columns, the header has 2"),
        ({"train.csv": "file,cat,dog\nb.png,1,2\n"}, "line 2: '2' is neither 0 nor 1"),
        ({"train.csv": "file,tags\nb.png,cat dog\n"}, "name the column labels"),
        ({"train.csv": "file,cat,cat\nb.png,1,0\n"}, "two columns have the same name"),
        ({"train.csv": "file,labels\n,x\n"}, "line 2: no file is named"),
        ({"train.csv": "\xff"}, "cannot be read: save it as UTF-8"),
        ({"train.csv": "file,x;y,z\nb.png,1,0\n"}, "the class 'x;y' has a ; in its name"),
        ({"train.json": "[1]"}, "not an object"),
        ({"train.json": '{"b.png": "cat"}'}, "b.png has no list of class names"),
        ({"train.json": '{"b.png": ["x"], "b.png": ["y"]}'}, "b.png occurs a second time"),
        ({"train.json": '{"b.png": '}, "cannot be read"),
    ],
)
def test_wrong_label_files_are_one_line(tmp_path, files, message):
    (tmp_path / "b.png").touch()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as error:
        list_labelled(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_another_separator_is_told(tmp_path, caplog):
    (tmp_path / "b.png").touch()
    (tmp_path / "val.csv").write_text("file,labels\r\n b.png ,cat|dog\r\n")
    assert list_labelled(tmp_path, "val").classes == ["cat|dog"]
    assert "'cat|dog' is one class; classes are separated by ;" in caplog.text


def test_the_other_kind_of_network_is_told(trained, folder, digits, capsys):
    flags = ["--eval", "true", "--resume", trained / "checkpoint-7.pth"]
    for kind in ("more", "images"):
        for colour in CLASSES:
            target = folder / "single" / kind / colour
            target.mkdir(parents=True)
            (target / "a.png").write_bytes((folder / "more" / "1.png").read_bytes())
    data = ["--data_set", "image_folder", "--data_path", folder / "single", "--eval_data_path",
            folder / "single" / "more"]  # fmt: skip
    run(config_of(*data, *flags))
    told = capsys.readouterr().out
    assert "trained for any number of classes per image, --data_set image_folder has one" in told


def test_json_and_images_without_classes(tmp_path):
    (tmp_path / "b.png").touch()
    text = json.dumps({"b.png": ["dog", "cat"], "c.png": [], "d.png": ["cat"]})
    (tmp_path / "val.json").write_text(text)
    listing = list_labelled(tmp_path, "val")
    assert listing.classes == ["cat", "dog"]
    assert [listing.labels_of(index).tolist() for index in range(3)] == [[0, 1], [], [0]]


def test_classes_that_the_data_lack_are_one_line(folder, tmp_path, trained):
    for part in ("train", "val"):
        (tmp_path / f"{part}.csv").write_text((folder / f"{part}.csv").read_text())
    for images in ("images", "more"):
        (tmp_path / images).symlink_to(folder / images)
    text = (tmp_path / "train.csv").read_text().replace("red", "blue")
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match="only in evaluation red"):
        run(config_of("--data_path", tmp_path))
    lines = [line.replace("file", "file,violet").replace("png,", "png,1,")
             for line in (folder / "val.csv").read_text().splitlines()]  # fmt: skip
    (tmp_path / "val.csv").write_text("\n".join(lines))
    flags = ["--eval", "true", "--resume", trained / "checkpoint-7.pth"]
    with pytest.raises(UserError, match="violet are not in the checkpoint"):
        run(config_of("--data_path", tmp_path, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "cross_entropy"], "give --loss bce or focal"),
        (["--mixup", "0.8"], "give --mixup 0 --cutmix 0"),
        (["--class_weights", "balanced"], "--class_weights balanced is for images of one class"),
        (["--class_balanced", "true"], "--class_balanced True is for images of one class"),
        (["--teacher", "resnet18"], "--teacher resnet18 is for images of one class"),
    ],
)
def test_what_needs_one_class_per_image_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        config_of(*flags)
