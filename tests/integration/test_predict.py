"""tools.predict, and what --eval writes: the same predictions by different ways."""

import csv
import io
import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import main
from checkpoints.reading import read_checkpoint
from config.command_line import parse_args
from inference import prediction
from inference.classifier import Classifier, in_words, load_classifier
from runtime.errors import UserError
from tests.integration.conftest import launch
from tools import predict


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A checkpoint with an average that differs from its weights."""
    out = tmp_path_factory.mktemp("run")
    average = ["--model_ema", "true", "--model_ema_decay", "0.5"]
    main.run(parse_args([*flags, *average, "--output_dir", str(out)]))
    return out / "checkpoint-1.pth"


def run(capsys, *argv):
    status = predict.main([str(argument) for argument in argv])
    return (status, *capsys.readouterr())


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_evaluation_and_predict_agree(flags, digits, trained, tmp_path, capsys, processes):
    out = tmp_path / "evaluation"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = launch(
        *(*launcher, "main.py", *flags, "--eval", "true", "--resume", trained),
        *("--model_ema_eval", "true", "--output_dir", out),
    )
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    for suffix, more in (("", []), ("_ema", ["--ema"])):
        written = read_csv((out / f"predictions{suffix}.csv").read_text())
        assert [row["file"] for row in written] == sorted(map(str, digits.glob("val/*/*.png")))
        command = [digits / "val", "--checkpoint", trained, "--csv", "--topk", 1, *more]
        status, table, _ = run(capsys, *command)
        assert status == 0
        for ours, theirs in zip(read_csv(table), written, strict=True):
            assert (ours["image"], ours["class"]) == (theirs["file"], theirs["predicted"])
            assert float(ours["probability"]) == pytest.approx(
                float(theirs["probability"]), abs=2e-4
            )
        # and the accuracies follow from the predictions
        for row in read_csv((out / f"accuracy_per_class{suffix}.csv").read_text()):
            own = [w for w in written if w["class"] == row["class"]]
            right = sum(w["predicted"] == w["class"] for w in own)
            assert (int(row["images"]), len(own)) == (11, 11)
            assert float(row["acc1"]) == pytest.approx(100 * right / 11, abs=0.01)
        right = sum(w["predicted"] == w["class"] for w in written)
        assert f"top-1 {100 * right / 33:.2f}%" in done.stdout
    tables = [(out / f"predictions{suffix}.csv").read_text() for suffix in ("", "_ema")]
    assert tables[0] != tables[1]


def test_unreadable_files_are_listed_and_the_rest_goes_on(digits, trained, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(next(digits.glob("val/0/*.png")), images / "a.png")
    shutil.copy(next(digits.glob("val/7/*.png")), images / "c.PNG")
    (images / "b.jpg").write_text("no image")
    (images / "notes.txt").write_text("not looked at")
    whole = (images / "a.png").read_bytes()
    (images / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("CMYK", (40, 30), "red").save(images / "cmyk.jpg")
    status, _, errors = run(capsys, images, images / "none.png", "--checkpoint", trained)
    assert (status, "none.png does not exist" in errors) == (1, True)
    status, out, errors = run(capsys, images, "--checkpoint", trained)
    assert status == 0
    assert [line.split()[0].rpartition("/")[2] for line in out.splitlines()] == [
        *("a.png", "c.PNG", "cmyk.jpg"),
    ]
    assert all(line.count("%") == 3 for line in out.splitlines())
    skipped = [line for line in errors.splitlines() if line.startswith("skipped: image")]
    assert len(skipped) == 2
    for name in ("b.jpg", "half.png"):
        assert any(name in line for line in skipped)
    status, out, _ = run(capsys, images, "--checkpoint", trained, "--json", "--topk", "2")
    report = json.loads(out)
    assert [len(image["predictions"]) for image in report["images"]] == [2, 2, 2]
    assert {item["image"] for item in report["unreadable"]} == {
        str(images / name) for name in ("b.jpg", "half.png")
    }
    first = report["images"][0]["predictions"]
    assert first[0]["class"] in ("0", "3", "7")
    assert first[0]["probability"] >= first[1]["probability"] > 0


def test_captioned_pictures(digits, trained, tmp_path, capsys):
    files = sorted(digits.glob("val/3/*.png"))[:2]
    run(capsys, *files, "--checkpoint", trained, "--show-dir", tmp_path / "show")
    pictures = sorted((tmp_path / "show").iterdir())
    assert [p.name for p in pictures] == [f"{i:04d}-{f.stem}.png" for i, f in enumerate(files)]
    picture = Image.open(pictures[0])
    assert picture.width == 320
    assert picture.height > 320  # the square image, and lines below it
    caption = picture.crop((0, 320, 320, picture.height)).convert("L")
    assert caption.getextrema()[0] < 100  # dark letters
    assert caption.getextrema()[1] == 255


def test_released_checkpoint_of_imagenet(digits, tmp_path, capsys):
    """Without class names and model: those of ImageNet, and the model by a flag."""
    small = {"base_dim": 16, "depths": (1, 1, 1, 1)}
    model = timm.create_model("hornet_atto_gf", **small)
    flags = {"model": "hornet_atto_gf", "model_kwargs": small, "input_size": 64, "crop_pct": 0.9}
    torch.save({"model": model.state_dict(), "args": flags}, tmp_path / "w.pth")
    classifier = load_classifier(str(tmp_path / "w.pth"))
    assert len(classifier.labels) == 1000
    assert classifier.labels[0].startswith("tench")
    assert classifier.preprocessing.transform(Image.new("RGB", (99, 80))).shape == (3, 64, 64)
    image = next(digits.glob("val/3/*.png"))
    assert run(capsys, image, "--checkpoint", tmp_path / "w.pth")[0] == 0
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    status, _, errors = run(capsys, image, "--checkpoint", tmp_path / "bare.pth")
    assert status == 1
    assert "does not name its model: give --model" in errors


@pytest.mark.parametrize("size", [{"img_size": 64}, {"img_size": None, "input_size": [3, 64, 64]}])
def test_checkpoint_of_timms_own_script(tmp_path, size):
    """Its flags share names with ours, at other types; the average has a name of its own."""
    kwargs = {"base_dim": 16, "depths": (1, 1, 1, 1)}
    networks = [timm.create_model("hornet_atto_7x7", num_classes=2, **kwargs) for _ in range(2)]
    flags = Namespace(model="hornet_atto_7x7", model_kwargs=kwargs, drop_path=None, crop_pct=None)
    vars(flags).update({"input_size": None} | size)
    weights = {n: m.state_dict() for n, m in zip(("state_dict", "state_dict_ema"), networks)}  # noqa: B905
    torch.save(weights | {"args": flags, "epoch": 1}, tmp_path / "last.pth.tar")
    for network, ema in zip(networks, (False, True), strict=True):
        classifier = load_classifier(str(tmp_path / "last.pth.tar"), ema=ema)
        assert classifier.preprocessing.input_size == 64
        torch.testing.assert_close(classifier.model.head.weight, network.head.weight)


def test_classifier_of_timm_with_a_conv_head(tmp_path):
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    flags = {"model": "mobilenetv3_small_050", "input_size": 64}
    torch.save({"model": model.state_dict(), "args": flags}, tmp_path / "a.pth")
    assert len(load_classifier(str(tmp_path / "a.pth")).labels) == 3


def test_view_follows_the_flags_of_the_run(tmp_path):
    small = {"base_dim": 16, "depths": (1, 1, 1, 1)}
    model = timm.create_model("hornet_atto_7x7", num_classes=2, **small)
    flags = {"model": "hornet_atto_7x7", "model_kwargs": small, "input_size": 64}
    image = Image.new("RGB", (128, 128), (255, 255, 255))
    image.paste((0, 0, 0), (32, 32, 96, 96))  # the inner half is black
    views = {}
    for share in (0.5, 1.0):
        more = {"crop_pct": share, "imagenet_default_mean_and_std": False}
        torch.save({"model": model.state_dict(), "args": flags | more}, tmp_path / "w.pth")
        views[share] = load_classifier(str(tmp_path / "w.pth")).preprocessing.transform(image)
    # normalised by 0.5 and 0.5: black is -1; cropped to the inner half, all but the edge is black
    assert views[1.0].min().item() == pytest.approx(-1, abs=1e-3)
    assert views[0.5][:, 4:-4, 4:-4].max().item() == pytest.approx(-1, abs=1e-3)
    assert views[1.0].mean() > views[0.5].mean() + 0.5


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_predictions(digits, trained, tmp_path, capsys, processes, workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = [digits / "val", broken, "--checkpoint", trained, "--topk", 2]
    table = run(capsys, *images, "--csv")[1]
    output = tmp_path / "found.csv"
    arguments = [*images, "--output", output, "--num-workers", workers, "--batch-size", 5]
    if processes == 1:
        status, _, errors = run(capsys, *arguments)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        code = "import os, sys; sys.path.insert(0, os.getcwd())\n"
        code += "from inference import prediction; prediction.PER_PART = 4\n"
        code += "from tools.predict import main; sys.exit(main())"
        (tmp_path / "small.py").write_text(code)
        together, alone = tmp_path / "together.npy", tmp_path / "alone.npy"
        done = launch(*launcher, tmp_path / "small.py", *arguments, "--features", together)
        status, errors = done.returncode, done.stderr
        assert run(capsys, *images, "--features", alone)[0] == 0
        np.testing.assert_allclose(np.load(together), np.load(alone), rtol=1e-5, atol=1e-6)
    assert status == 0, errors
    assert "skipped: image" in errors
    assert output.read_text() == table
    assert not output.with_name("found.csv.parts").exists()


def test_a_stopped_file_of_predictions_goes_on(digits, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "PER_PART", 4)
    output = tmp_path / "found.jsonl"
    arguments = [digits / "val", "--checkpoint", trained, "--output", output, "--num-workers", 0]
    seen = []
    predictions = prediction.predictions

    def stops(classifier, files, **rest):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(files)
        return predictions(classifier, files, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "predictions", stops)
        assert run(capsys, *arguments)[0] == 130
    assert not output.exists()
    status, _, errors = run(capsys, *arguments, "--topk", 1)
    assert (status, "found.jsonl.parts is of other images or options" in errors) == (1, True)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "predictions", lambda c, f, **r: seen.append(f) or
                      predictions(c, f, **r))  # fmt: skip
        assert run(capsys, *arguments)[0] == 0
    assert len(seen) == 9  # of 33 images, none twice
    assert len({file for files in seen for file in files}) == 33
    wanted = json.loads(run(capsys, digits / "val", "--checkpoint", trained, "--json")[1])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert found == wanted["images"]
    status, _, errors = run(capsys, *arguments)
    assert (status, "exists already: give another name" in errors) == (1, True)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_files_of_features(digits, trained, tmp_path, capsys, monkeypatch, suffix):
    """Those of the network, whatever the parts; the head makes the probabilities of them."""
    monkeypatch.setattr(prediction, "PER_PART", 7)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    odd = tmp_path / "a\rb.png"  # which Python's csv module reads as two lines, unless quoted
    shutil.copy(next(digits.glob("val/3/*.png")), odd)
    features, output = tmp_path / f"found{suffix}", tmp_path / "found.jsonl"
    arguments = [broken, digits / "val", odd, "--checkpoint", trained, "--topk", 10]
    status, _, errors = run(
        capsys, *arguments, "--features", features, "--output", output, "--num-workers", 0
    )
    assert status == 0, errors
    read = np.load if suffix == ".npy" else lambda path: load_file(path)["features"].numpy()
    found = read(features)
    with (tmp_path / f"found{suffix}.images.csv").open(newline="") as table:
        files = [Path(row["image"]) for row in csv.DictReader(table)]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(line["image"]) for line in lines] == files
    assert (len(files), broken in files, files[-1]) == (34, False, odd)
    classifier = load_classifier(str(trained))
    assert (found.dtype, found.shape) == (np.float32, (34, classifier.model.num_features))
    model = load_classifier(str(trained)).model
    taken = []
    model.get_classifier().register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.inference_mode():
        shares = model(classifier.inputs(files)).softmax(1)
    np.testing.assert_allclose(found, taken[0].numpy(), rtol=1e-4, atol=1e-5)
    for line, row in zip(lines, shares.tolist(), strict=True):
        told = {found["class"]: found["probability"] for found in line["predictions"]}
        assert told == pytest.approx(dict(zip(classifier.labels, row, strict=True)), abs=1e-5)
    # by themselves, too; and no file is written over
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / f"f{suffix}"
    assert run(capsys, *arguments, "--features", alone, "--num-workers", 0)[0] == 0
    np.testing.assert_allclose(read(alone), found, rtol=1e-5, atol=1e-6)
    assert {path.name for path in alone.parent.iterdir()} == {alone.name, f"f{suffix}.images.csv"}
    status, _, errors = run(capsys, *arguments, "--features", alone)
    assert (status, "exists already: give another name" in errors) == (1, True)
    # of a mistyped path nothing is left, so that the right one can follow
    gone = [tmp_path / "gone", "--checkpoint", trained, "--features", tmp_path / f"new{suffix}"]
    assert run(capsys, *gone)[0] == 1
    assert not [*tmp_path.glob("new*")]
    # a command that was stopped goes on
    again = alone.with_name(f"again{suffix}")
    stopped = [*arguments, "--features", again, "--num-workers", 0]
    seen = []

    def stops(classifier, files, **rest):
        seen.append(files)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return predictions(classifier, files, **rest)

    predictions = prediction.predictions
    with monkeypatch.context() as patch:
        patch.setattr(predict, "predictions", stops)
        assert run(capsys, *stopped)[0] == 130
    assert not again.exists()
    assert run(capsys, *stopped)[0] == 0
    np.testing.assert_array_equal(read(again), read(alone))


def test_half_precision_only_where_it_is_exact(digits, trained, tmp_path, capsys):
    """By default on GPUs; checked here by autocast of the CPU."""
    classifier, cpu = load_classifier(str(trained)), torch.device("cpu")
    files = sorted(digits.glob("val/*/*.png"))
    assert prediction.lower_precision(classifier, files, cpu) == torch.float16
    assert prediction.lower_precision(classifier, [tmp_path / "none.png"] * 9, cpu) is None
    exact, half = (
        [*prediction.predictions(classifier, files, cpu, 10, 8, precision=precision)]
        for precision in (None, torch.bfloat16)
    )
    distances = [
        abs(dict(one.classes)[name] - share)
        for one, other in zip(exact, half, strict=True)
        for name, share in other.classes
    ]
    assert 1e-6 < max(distances) < 0.1
    told = run(capsys, files[0], "--checkpoint", trained, "--dtype", "bfloat16", "--json")[1]
    (shown,) = json.loads(told)["images"]
    for found in shown["predictions"]:
        assert found["probability"] == pytest.approx(dict(half[0].classes)[found["class"]])
    with torch.no_grad():
        classifier.model.get_classifier().weight.mul_(1e8)  # beyond float16
    assert prediction.lower_precision(classifier, files, cpu) is None
    # then a batch is repeated in float32
    (beyond,) = prediction.predictions(classifier, files[:1], cpu, 10, 8, precision=torch.float16)
    (exact_one,) = prediction.predictions(classifier, files[:1], cpu, 10, 8)
    assert beyond.classes == exact_one.classes


def test_a_killed_reader_is_told(digits, trained, monkeypatch):
    """Torch tells of it where the main process is: at the loader, or inside the model."""
    classifier, cpu = load_classifier(str(trained)), torch.device("cpu")
    files = sorted(digits.glob("val/*/*.png"))

    def dies(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with classifier.model.register_forward_pre_hook(dies), pytest.raises(UserError) as inside:
        next(prediction.predictions(classifier, files, cpu, 1, 8))
    monkeypatch.setattr(prediction._Inputs, "__getitem__", dies)
    with pytest.raises(UserError) as outside:
        next(prediction.predictions(classifier, files, cpu, 1, 8))
    for told in (inside, outside):
        assert "a loader worker was killed, perhaps for lack of memory" in str(told.value)


def test_names_of_classes():
    assert in_words(["cat", "dog"]) == ["cat", "dog"]
    assert in_words(["0", "1"]) == ["0", "1"]
    assert in_words(["n01440764", "n01443537"])[1].startswith("goldfish")


def test_mistakes_are_one_line(digits, trained, tmp_path, capsys):
    image = next(digits.glob("val/3/*.png"))
    headless = read_checkpoint(trained)
    headless["model"] = {k: v for k, v in headless["model"].items() if "head" not in k}
    torch.save(headless, tmp_path / "headless.pth")
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([image, "--checkpoint", "none.pth"], "none.pth does not exist"),
        ([image, "--checkpoint", image], "cannot be read"),
        ([image, "--checkpoint", tmp_path / "headless.pth"], "has no head"),
        ([image, "--checkpoint", trained, "--topk", "0"], "--topk"),
        ([image, "--checkpoint", "htps://x/a.pth"], "htps://x/a.pth: give a path, or an address"),
        (
            [image, "--checkpoint", trained, "--input-size", "0"],
            "0: give pixels, as in 224 or 224x320",
        ),
        (
            [image, "--checkpoint", trained, "--input-size", "16"],
            "--input-size 16: the model",
        ),
        ([image, "--checkpoint", trained, "--model", "hornet_tinny_gf"], "near names"),
        ([image, "--checkpoint", trained, "--model", "hornet_atto_gf"], "another model"),
        ([tmp_path / "empty", "--checkpoint", trained], "has no images"),
        ([image, "--checkpoint", trained, "--show-dir", image / "x"], "--show-dir"),
        ([image, "--checkpoint", trained, "--output", "a.txt"], "give FILE.csv or FILE.jsonl"),
        (
            [image, "--checkpoint", trained, "--features", "a.csv"],
            "--features a.csv: give FILE.npy or FILE.safetensors",
        ),
        (
            [image, "--checkpoint", trained, "--features", "a.npy", "--json"],
            "--features goes with --output FILE",
        ),
        ([image, "--checkpoint", trained, "--output", "none/a.csv"], "none is not a folder"),
        ([image, "--checkpoint", trained, "--num-workers", "-1"], "--num-workers -1"),
    ):
        status, output, errors = run(capsys, *argv)
        assert (status, output) == (1, "")
        assert errors.startswith("tools.predict: error: ")
        assert message in errors
        assert errors.count("\n") == 1
    assert run(capsys, tmp_path / "none.png", "--checkpoint", trained)[0] == 1


def test_the_class_of_a_file_is_its_outermost_class_folder(tmp_path):
    classifier = SimpleNamespace(folders=["cat", "dog", "wolf"], multi_label=False)

    def truth(*files):
        found = Classifier.truth(classifier, [tmp_path / "cat" / file for file in files])
        return found if found is None else found.tolist()

    # the folder "cat" above all files does not count, unless it is the only one
    assert truth("dog/a.png", "wolf/b.png", "wolf/dog/c.png", "cat/2019/d.png") == [1, 2, 2, 0]
    assert truth("wolf/2019/a.png", "wolf/2020/b.png") == [2, 2]
    assert truth("a.png") == [0]
    assert Classifier.truth(classifier, [tmp_path / "bird/a.png"]) is None
