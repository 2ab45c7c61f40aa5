"""Files of point clouds: every format, in small, and what is wrong in them."""

import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

from config.flags import AugmentConfig, DataConfig
from input_pipeline.image_sets import Part
from input_pipeline.loaders import EvalImages, TrainImages
from input_pipeline.unreadable import UnreadableImages
from point_clouds import prepare
from point_clouds.datasets import SCAN_OBJECT_CLASSES, build_data
from point_clouds.flags import PointConfig, parse_args
from point_clouds.readers import read_cloud, read_stored
from runtime.errors import UserError

POINTS = PointConfig(local_size=4, num_points=16, up_axis="z", unit_sphere=False)
CLASSES = ["bed", "chair", "tv_stand"]
RANDOM = np.random.RandomState(0)


def clouds(count, points=20, columns=3):
    return RANDOM.standard_normal((count, points, columns)).astype(np.float32)


def open_set(data_set, root, fraction=0.0, with_train=True, points=POINTS):
    config = DataConfig(data_set, str(root), val_fraction=fraction)
    return build_data(config, AugmentConfig(), 32, with_train, points=points)


def assert_holds(images, expected, labels):
    """The points of each cloud, in any order: farthest points are a permutation of them."""
    assert len(images) == len(expected)
    for index, (cloud, label) in enumerate(zip(expected, labels, strict=True)):
        read, own_label = images.read(index)
        np.testing.assert_array_equal(read, cloud[:, :3])
        assert own_label == label


def test_pickles_of_p2p(tmp_path):
    stored, labels = clouds(6, columns=6), [0, 1, 2, 0, 1, 2]
    (tmp_path / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES))
    for part in ("train", "test"):
        names = [f"{CLASSES[label]}_{number:04}" for number, label in enumerate(labels)]
        (tmp_path / f"modelnet40_{part}.txt").write_text("\n".join(names) + "\n")
        with (tmp_path / f"modelnet40_{part}_8192pts_fps.dat").open("wb") as file:
            pickle.dump(([*stored], [np.array([label]) for label in labels]), file)
    data = open_set("ModelNet40", tmp_path)
    assert data.classes == CLASSES
    assert_holds(data.train, stored, labels)
    assert data.train.name(2).endswith("tv_stand_0002")


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_pickles_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "modelnet40_train_8192pts_fps.dat"
    path.write_bytes(pickle.dumps(([Harmful()], [0])))
    with pytest.raises(UserError, match="which could run code"):
        read_stored(path)
    assert not (tmp_path / "harmed").exists()


def write_h5(path, stored, labels):
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = stored, labels


def test_hdf5_files_of_modelnet40(tmp_path):
    stored = clouds(6)
    (tmp_path / "shape_names.txt").write_text("\n".join(CLASSES))
    write_h5(tmp_path / "ply_data_train0.h5", stored[:3], np.array([[0], [1], [2]], np.uint8))
    write_h5(tmp_path / "ply_data_train1.h5", stored[3:], np.array([[2], [1], [0]], np.uint8))
    write_h5(tmp_path / "ply_data_test0.h5", stored[:3], np.array([[0], [1], [2]], np.uint8))
    data = open_set("ModelNet40", tmp_path)
    assert_holds(data.train, stored, [0, 1, 2, 2, 1, 0])
    assert_holds(data.val, stored[:3], [0, 1, 2])


def test_scanobjectnn(tmp_path):
    stored, labels = clouds(15), np.arange(15)
    (tmp_path / "main_split").mkdir()
    for part in ("training", "test"):
        name = f"{part}_objectdataset_augmentedrot_scale75.h5"
        write_h5(tmp_path / "main_split" / name, stored, labels)
    data = open_set("ScanObjectNN", tmp_path)
    assert data.classes == SCAN_OBJECT_CLASSES
    assert_holds(data.val, stored, labels)


def test_text_files_of_modelnet40(tmp_path):
    stored, labels = clouds(3, columns=6), [0, 1, 2]
    (tmp_path / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES))
    names = [f"{name}_0001" for name in CLASSES]
    for part in ("train", "test"):
        (tmp_path / f"modelnet40_{part}.txt").write_text("\n".join(names))
    for folder, name, cloud in zip(CLASSES, names, stored, strict=True):
        (tmp_path / folder).mkdir()
        np.savetxt(tmp_path / folder / f"{name}.txt", cloud, delimiter=",", fmt="%.9g")
    assert_holds(open_set("ModelNet40", tmp_path).train, stored, labels)


CUBE = """8 12 0
-1 -1 -1
1 -1 -1
1 1 -1
-1 1 -1
-1 -1 3
1 -1 3
1 1 3
-1 1 3
3 0 1 2
3 0 2 3
3 4 5 6
3 4 6 7
3 0 1 5
3 0 5 4
3 1 2 6
3 1 6 5
3 2 3 7
3 2 7 6
3 3 0 4
3 3 4 7
"""


@pytest.mark.parametrize("start", ["OFF\n", "OFF"])  # some files lack the line break
def test_meshes_are_sampled_by_area(start, tmp_path):
    for part in ("train", "test"):
        for name in CLASSES:
            (tmp_path / name / part).mkdir(parents=True)
            (tmp_path / name / part / f"{name}_1.off").write_text(start + CUBE)
    data = open_set("ModelNet40", tmp_path)
    cloud, label = data.train.read(1)
    assert label == 1
    assert (cloud == data.val.read(1)[0]).all()
    # of the area of 2 x (2 x 2) + 4 x (2 x 4), a tenth each is below and above
    assert abs((cloud[:, 2] == -1).mean() - 0.1) < 0.02
    assert abs((abs(cloud[:, 0]) == 1).mean() - 0.4) < 0.03


def write_folders(root, suffix, stored):
    for part in ("train", "test"):
        for name, cloud in zip(CLASSES, stored, strict=True):
            path = root / part / name / f"one{suffix}"
            path.parent.mkdir(parents=True)
            if suffix == ".npy":
                np.save(path, cloud)
            elif suffix == ".npz":
                np.savez(path, points=cloud, colours=cloud)
            elif suffix == ".ply":
                lines = [f"property float {axis}" for axis in "xyz"]
                header = ["ply", "format ascii 1.0", f"element vertex {len(cloud)}", *lines]
                text = [" ".join(f"{value:.9g}" for value in point) for point in cloud]
                path.write_text("\n".join([*header, "end_header", *text]) + "\n")
            else:
                count = f"{len(cloud)}\n" if suffix == ".pts" else ""
                lines = (" ".join(f"{value:.9g}" for value in point) for point in cloud)
                path.write_text(count + "\n".join(lines))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".ply", ".txt", ".xyz", ".pts"])
def test_folders_of_clouds(suffix, tmp_path):
    stored = clouds(3)
    write_folders(tmp_path, suffix, stored)
    data = open_set("clouds", tmp_path)
    assert data.classes == CLASSES
    assert_holds(data.train, stored, [0, 1, 2])
    points, label = data.val[2]
    assert label == 2
    assert points.shape == (16, 3)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", "x,y,z,r\n{},{},{},9\n"),
        (".csv", "\ufeff{};{};{}\n"),
        (".xyz", "20\n{} {} {}\n"),
        (".txt", "//X Y Z\n{}\t{}\t{}\n"),
        (".txt", "# points\n{}, {}, {}\n"),
    ],
)
def test_text_below_a_header(suffix, text, tmp_path):
    cloud = clouds(1)[0]
    *header, line = text.splitlines()
    lines = [line.lstrip("\ufeff").format(*map(repr, map(float, point))) for point in cloud]
    lines[0] = ("\ufeff" if "\ufeff" in text else "") + lines[0]
    path = tmp_path / f"a{suffix}"
    path.write_text("\n".join([*header, *lines]), encoding="utf-8")
    np.testing.assert_array_equal(read_cloud(path), cloud)
    path.write_text("0,1 0,2 0,3\n0,4 0,5 0,6\n")
    with pytest.raises(UserError, match="decimal commas"):
        read_cloud(path)


def test_large_coordinates_keep_their_shape(tmp_path):
    stored = clouds(3)
    far = stored.astype(np.float64) + [5e5, 4.5e6, 100]
    for folder, content in (("near", stored), ("far", far)):
        write_folders(tmp_path / folder, ".npy", content)
    points = PointConfig(local_size=4, num_points=16)
    near, away = (
        open_set("clouds", tmp_path / name, points=points).train.read(1)[0]
        for name in ("near", "far")
    )
    np.testing.assert_allclose(near, away, atol=1e-6)
    assert away.dtype == np.float32


def test_clouds_so_small_that_none_of_their_points_is_sampled(tmp_path):
    write_folders(tmp_path, ".npy", 0.005 * clouds(3))
    with pytest.raises(UserError, match=r"most points lie within 0\.03 of the origin"):
        open_set("clouds", tmp_path).train.read(0)
    points = PointConfig(local_size=4, num_points=16)
    assert open_set("clouds", tmp_path, points=points).train.read(0)


def test_validation_clouds_of_ones_own_choose_the_epoch(tmp_path, caplog):
    write_folders(tmp_path, ".npy", clouds(3))
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    data = open_set("clouds", tmp_path, fraction=0.3)
    assert {data.val.name(i).split("/")[-3] for i in range(3)} == {"val"}
    tested = open_set("clouds", tmp_path, with_train=False).val
    assert {tested.name(i).split("/")[-3] for i in range(3)} == {"test"}
    shutil.rmtree(tmp_path / "test")
    shutil.rmtree(tmp_path / "val")
    for name in CLASSES:
        np.save(tmp_path / "train" / name / "two.npy", clouds(1)[0])
    open_set("clouds", tmp_path, fraction=0.3)
    assert "there will be no vote" in caplog.text


def test_test_clouds_of_other_classes_are_refused_before_the_training(tmp_path):
    write_folders(tmp_path, ".npy", clouds(3))
    (tmp_path / "test/bed").rename(tmp_path / "test/zebra")
    for name in CLASSES:
        np.save(tmp_path / "train" / name / "two.npy", clouds(1)[0])
    with pytest.raises(UserError, match="classes without training clouds: zebra"):
        open_set("clouds", tmp_path, fraction=0.5)


def test_a_share_of_the_training_clouds_is_held_out(tmp_path):
    for part, count in (("train", 20), ("test", 5)):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                np.save(tmp_path / part / name / f"{number}.npy", clouds(1)[0])
    data = open_set("clouds", tmp_path, fraction=0.2)
    train, val = ({images.name(i) for i in range(len(images))} for images in (data.train, data.val))
    assert len(train) + len(val) == 60
    assert not train & val
    assert 3 <= len(val) <= 24
    assert not any("/test/" in name for name in train | val)
    assert len(open_set("clouds", tmp_path).val) == 15
    tested = open_set("clouds", tmp_path, fraction=0.2, with_train=False).val
    assert {tested.name(i).split("/")[-3] for i in range(len(tested))} == {"test"}


def test_axes_and_scale(tmp_path):
    stored = 5 + 3 * clouds(3)
    write_folders(tmp_path, ".npy", stored)
    points = PointConfig(local_size=4, num_points=16)
    cloud, _ = open_set("clouds", tmp_path, points=points).train.read(0)
    x, y, z = (stored[0] - stored[0].mean(axis=0)).T
    expected = np.stack((-z, -x, y), axis=1)
    expected /= np.linalg.norm(expected, axis=1).max()
    np.testing.assert_allclose(cloud, expected, atol=1e-6)


BAD = {
    "empty": np.zeros((0, 3), np.float32),
    "single": np.ones((1, 3), np.float32),
    "few": np.eye(3, dtype=np.float32),
    "equal": np.ones((20, 3), np.float32),
    "nan": np.where(np.arange(60).reshape(20, 3) == 7, np.nan, 1).astype(np.float32),
    "infinite": np.where(np.arange(60).reshape(20, 3) == 7, np.inf, 1).astype(np.float32),
    "flat": np.ones((20, 2), np.float32),
    "words": np.full((20, 3), "a"),
    "objects": np.array([{}, []], dtype=object),
}


@pytest.mark.parametrize("kind", BAD)
def test_clouds_without_an_image_are_replaced_and_listed(kind, tmp_path):
    """With --max_images, too, as which a part of a set is read."""
    for part in ("train", "test"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            np.save(tmp_path / part / name / "good.npy", clouds(1)[0])
        np.save(tmp_path / part / "bed" / "bad.npy", BAD[kind])
    data = open_set("clouds", tmp_path)
    unreadable = UnreadableImages(tmp_path / "bad_images.txt", 10)
    bad = next(i for i in range(4) if "bad" in data.train.name(i))
    points, label = TrainImages(data.train, 0, unreadable)[0, bad]
    assert (label, points.shape) == (0, (2, 16, 3))
    assert points.isfinite().all()
    for val in (data.val, Part(data.val, torch.arange(4))):
        points, label = EvalImages(val, unreadable)[bad]
        assert (label, points.shape) == (-1, (16, 3))
    lines = unreadable.path.read_text().splitlines()
    assert len(lines) == 2
    assert all("bad.npy" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b"no array"),
        ("a.npz", b"no archive"),
        ("a.txt", b""),
        ("a.txt", b"1 2 3\n4 5\n"),
        ("a.txt", b"x y z\n"),
        ("a.txt", b"\xff\xfe"),
        ("a.off", b""),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n"),
        ("a.ply", b"ply\n"),
        ("missing.npy", None),
    ],
)
def test_damaged_files_are_named(name, content, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_cloud(path)


@pytest.mark.parametrize(
    ("labels", "stored", "message"),
    [
        ([0, 1], (3, 20, 3), "3 clouds, but 2 int64 labels"),
        ([0, 1, 3], (3, 20, 3), "labels from 0 to 3, but 3 classes"),
        ([0, 1, 2], (3, 60), "not clouds"),
        ([0.0, 1.0, 2.0], (3, 20, 3), "3 float64 labels"),
        ([], (0, 20, 3), "holds no clouds"),
    ],
)
def test_files_of_many_clouds_that_do_not_fit(labels, stored, message, tmp_path):
    (tmp_path / "shape_names.txt").write_text("\n".join(CLASSES))
    write_h5(
        tmp_path / "ply_data_train0.h5", np.zeros(stored, np.float32), labels or np.zeros(0, int)
    )
    with pytest.raises(UserError, match=message):
        open_set("ModelNet40", tmp_path)


def test_lists_and_archives_of_another_form(tmp_path):
    np.savez(tmp_path / "train.npz", points=np.zeros((3, 20, 3)), labels=np.zeros(3, int))
    with pytest.raises(UserError, match=r"train\.npz cannot be read: .*ends"):
        open_set("clouds", tmp_path)
    (tmp_path / "train.npz").unlink()
    write_h5(tmp_path / "ply_data_train0.h5", clouds(3), np.arange(3))
    (tmp_path / "shape_names.txt").write_bytes(b"b\xe4d\nchair\ntv")
    with pytest.raises(UserError, match=r"shape_names\.txt cannot be read"):
        open_set("ModelNet40", tmp_path)
    (tmp_path / "shape_names.txt").write_text("bed\nchair\nbed")
    with pytest.raises(UserError, match="a class is listed twice: bed, chair, bed"):
        open_set("ModelNet40", tmp_path)


@pytest.mark.parametrize("scale", [1.0, 0.005])
def test_prepared_files_hold_the_same_clouds(scale, tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "prepared"
    write_folders(source, ".npy", scale * clouds(3, points=30))
    np.save(source / "test/bed/one.npy", scale * clouds(1, points=10)[0])
    np.save(source / "train/bed/bad.npy", BAD["nan"])
    arguments = ["clouds", str(source), str(output), "--num-points", "24", "--jobs", "1"]
    assert prepare.main(arguments) == 0
    assert "left out: bed/bad.npy: it has coordinates" in capsys.readouterr().err
    points = PointConfig(local_size=4, num_points=16, up_axis="z", unit_sphere=True)
    from_files, prepared = (open_set("clouds", r, points=points) for r in (source, output))
    assert prepared.classes == CLASSES
    assert len(prepared.train) == 3
    # a smaller cloud has its own points only
    assert [len(prepared.val.read(i)[0]) for i in range(3)] == [10, 24, 24]
    small, same = (one.val.read(0)[0] for one in (prepared, from_files))
    np.testing.assert_allclose(small[small[:, 0].argsort()], same[same[:, 0].argsort()], atol=1e-6)
    for index in range(3):
        label = prepared.val[index][1]
        assert label == from_files.val[index][1] == index
    assert prepare.main(arguments) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_points", "16"], "--num_points 16: fewer than the --local_size 32"),
        (["--reprob", "0.1"], "--reprob is for images"),
        (["--drop_path", "0.1"], "--drop_path is for images .* --backbone_kwargs"),
        (["--eval_data_path", "x"], "--eval_data_path is for images"),
        (["--mixup", "0.8"], "cannot be mixed"),
        (["--smoke", "true"], "make demo-points"),
        (["--model", "resnet18"], "--backbone"),
        (["--model_kwargs", '{"depth": 3}'], "--backbone_kwargs"),
        (["--head", "conv"], "--head conv"),
        (["--obj_sise", "64"], "did you mean obj_size"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--config", "point_clouds/configs/modelnet40.yaml", *flags])


@pytest.mark.parametrize(
    ("data_set", "message"),
    [
        ("ModelNet", "choose one of ModelNet40"),
        ("ModelNet40", "holds no train clouds"),
        ("clouds", "holds no train clouds"),
    ],
)
def test_missing_data_is_named(data_set, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_set(data_set, tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        open_set("ModelNet40", tmp_path / "missing")
