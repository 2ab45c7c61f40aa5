"""Data sets that are no class folders: CIFAR-100, tar files, WebDataset, Hugging Face."""

import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

import main
from config.command_line import parse_args
from runtime.errors import UserError
from tests.integration.conftest import launch


@pytest.fixture
def network():
    return [
        *("--model", "hornet_atto_7x7"),
        *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
        *("--input_size", "32", "--num_workers", "0", "--device", "cpu", "--batch_size", "8"),
        *("--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-3"),
    ]


def last_record(folder):
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def train(*flags):
    main.run(parse_args([str(flag) for flag in flags]))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-100's files with 20 and 12 images, whose checksums count as the real ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = np.random.RandomState(0)
    for name, count in (("train", 20), ("test", 12)):
        content = {
            "data": random.randint(0, 256, (count, 3 * 32 * 32), dtype=np.uint8),
            "fine_labels": list(range(count)),
        }
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": [f"class{i:03d}" for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path


def test_cifar(network, cifar, capsys):
    out = cifar / "run"
    train(*network, "--data_set", "CIFAR", "--data_path", cifar, "--output_dir", out)
    assert "test on 12 images" in capsys.readouterr().out
    assert last_record(out)["n_parameters"] > 100 * 128  # a head of 100 classes


def test_cifar_that_cannot_be_downloaded(network, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    flags = [*network, "--data_set", "CIFAR", "--data_path", tmp_path]
    with pytest.raises(UserError, match="--data_set CIFAR cannot be stored in --data_path"):
        train(*flags)


def as_tar(path, folder):
    """`folder`, one folder of images a class, as a tar file."""
    with tarfile.open(path, "w") as tar:
        for image in sorted(folder.rglob("*.png")):
            tar.add(image, image.relative_to(folder))


def test_tar_files(network, digits, tmp_path, capsys):
    as_tar(tmp_path / "train.tar", digits / "train")
    (tmp_path / "val").mkdir()
    for label in "037":
        as_tar(tmp_path / "val" / f"{label}.tar", digits / "val" / label)
    out = tmp_path / "run"
    train(*network, "--data_set", "tar", "--data_path", tmp_path, "--output_dir", out)
    assert "test on 33 images" in capsys.readouterr().out
    # the same images as folders give the same accuracy
    checkpoint = ["--eval", "true", "--resume", out / "checkpoint-0.pth"]
    train(*network, *checkpoint, "--data_set", "image_folder", "--data_path", digits)
    record = last_record(out)
    assert f"top-1 {record['test_acc1']:.2f}%" in capsys.readouterr().out


def as_shards(folder, images, part, shards):
    """WebDataset shards of the class folders in `images`, dealt out in turn."""
    files = sorted((images / part).rglob("*.png"), key=lambda path: path.name)
    labels = sorted(path.name for path in (images / part).iterdir())
    for shard in range(shards):
        with tarfile.open(folder / f"{part}-{shard}.tar", "w") as tar:
            for file in files[shard::shards]:
                label = str(labels.index(file.parent.name)).encode()
                for suffix, content in (("png", file.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{file.parent.name}-{file.stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_webdataset(network, digits, tmp_path, processes):
    for part in ("train", "val"):
        as_shards(tmp_path, digits, part, 4)
    splits = ["--train_split", "train-{0..3}.tar|72", "--val_split", "val-{0..3}.tar|33"]
    out = tmp_path / "run"
    flags = [*network, *splits, "--data_set", "wds/", "--data_path", tmp_path, "--nb_classes", "3"]
    flags += ["--num_workers", "2", "--output_dir", out]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = launch(*launcher, "main.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f"step {72 // 8 // processes}/{72 // 8 // processes}" in done.stdout
    assert "test on 33 images" in done.stdout
    assert abs(last_record(out)["test_acc1"] * 33 / 100 % 1) < 1e-6
    # each image once: the same checkpoint gives the same numbers on the folders of images
    done = launch(
        *("main.py", *network, "--data_set", "image_folder", "--data_path", digits),
        *("--eval", "true", "--resume", out / "checkpoint-0.pth"),
    )
    assert done.returncode == 0, done.stderr
    record = last_record(out)
    assert f"top-1 {record['test_acc1']:.2f}%  top-5 {record['test_acc5']:.2f}%" in done.stdout
    assert f"loss {record['test_loss']:.4f}" in done.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_listed(network, digits, tmp_path, workers):
    for part in ("train", "val"):
        as_shards(tmp_path, digits, part, 4)
    (tmp_path / "train-1.tar").write_bytes(b"no tar file" * 1000)
    shard = tmp_path / "train-2.tar"
    content = shard.read_bytes()
    place = content.find(b"\x89PNG") + 20
    shard.write_bytes(content[:place] + bytes(20) + content[place + 20 :])
    splits = ["--train_split", "train-{0..3}.tar|72", "--val_split", "val-{0..3}.tar|33"]
    data = ["--data_set", "wds/", "--data_path", tmp_path, "--num_workers", workers, *splits]
    out = tmp_path / "run"
    flags = [*network, *data, "--nb_classes", "3", "--epochs", "2", "--output_dir", out]
    train(*flags)
    lines = (out / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in sorted(lines)] == [
        str(tmp_path / "train-1.tar"),
        "an image of a shard",
    ]
    assert last_record(out)["epoch"] == 1
    shutil.rmtree(out)
    with pytest.raises(UserError, match="more than --max_bad_images 1"):
        train(*flags, "--max_bad_images", "1")


@pytest.mark.slow
def test_more_loader_processes_than_shards(network, digits, tmp_path):
    as_shards(tmp_path, digits, "train", 1)
    flags = ["--data_set", "wds/", "--data_path", tmp_path, "--train_split", "train-0.tar|72"]
    flags += ["--num_workers", "2", "--disable_eval", "true", "--nb_classes", "3"]
    with pytest.raises(UserError, match="1 shards are too few for 2 loader processes"):
        train(*network, *flags)


def test_label_beyond_nb_classes(network, digits, tmp_path):
    as_shards(tmp_path, digits, "train", 1)
    flags = ["--data_set", "wds/", "--data_path", tmp_path, "--train_split", "train-0.tar|72"]
    flags += ["--disable_eval", "true", "--nb_classes", "2"]
    with pytest.raises(UserError, match="the label 2 is beyond --nb_classes 2"):
        train(*network, *flags)


def test_place_of_data_sets_that_bring_their_images(network):
    for name in ("digits", "CIFAR", "torch/cifar10"):
        with pytest.raises(UserError, match=f"{name} needs a folder: give --data_path"):
            train(*network, "--data_set", name)


@pytest.mark.slow
def test_hugging_face(network, digits, tmp_path):
    """A local data set of images, read by the package that has the name of our datasets.py."""
    images = tmp_path / "images"
    for ours, theirs in (("train", "train"), ("val", "validation")):
        shutil.copytree(digits / ours, images / theirs)
        (images / theirs / "3/broken.png").write_bytes(b"no image")
    out = tmp_path / "run"
    done = launch(
        *("main.py", *network, "--data_set", f"hfds/{images}", "--output_dir", out),
        *("--num_workers", "2", "--data_path", tmp_path),
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    assert "test on 33 images" in done.stdout
    listed = (out / "bad_images.txt").read_text().splitlines()
    assert ["broken.png" in line for line in listed] == [True, True]
    # resumed, and with the names of the classes
    done = launch(
        *("main.py", *network, "--data_set", "image_folder", "--data_path", digits),
        *("--eval", "true", "--resume", out / "checkpoint-0.pth"),
    )
    assert f"top-1 {last_record(out)['test_acc1']:.2f}%" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("data_set", "message"),
    [
        ("imnet", "--data_set imnet: choose one of IMNET, image_folder"),
        ("tfds/mnist", "--data_set tfds/mnist needs a package"),
        ("torch/nothing", "--data_set torch/nothing cannot be stored in --data_path"),
        ("tar", "neither a tar file nor a folder of tar files"),
        ("wds/", "--train_split 'train-{000..099}.tar|50000'"),
    ],
)
def test_data_sets_that_are_not_there_are_one_line(network, tmp_path, data_set, message):
    with pytest.raises(UserError) as caught:
        train(*network, "--data_set", data_set, "--data_path", tmp_path)
    assert message in str(caught.value)


@pytest.mark.slow
def test_hugging_face_set_that_is_not_there(network):
    done = launch("main.py", *network, "--data_set", "hfds/no/such", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("main.py: error: --data_set hfds/no/such, split train: ")
    assert done.stderr.count("\n") == 1


def test_max_images_are_spread_over_the_classes(network, digits, tmp_path, capsys):
    flags = [*network, "--data_set", "image_folder", "--data_path", digits, "--max_images", "24"]
    train(*flags, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert "step 3/3" in out
    assert "test on 24 images" in out
