"""What people's own data and settings do: repaired, told, or refused in one line."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from mmdet.utils import register_all_modules
from PIL import Image

import dense.folders
from dense import annotations
from dense.backbone import HorNet
from dense.classes import check_heads
from dense.configs import read_config
from dense.folders import FolderSegDataset
from dense.loading import OwnFolder, read
from dense.options import check_files, check_loaders, check_options
from dense.run import load_truth_last, main
from dense.shapes import SHAPES, write_coco, write_masks
from runtime.errors import UserError
from tests.dense.test_run import SEGMENTOR, small
from tests.integration.conftest import ROOT

DETECTOR = "configs/demo/mask_rcnn_shapes.py"
OWN_DETECTOR = "configs/finetune/faster_rcnn_own_data.py"
OWN_SEGMENTOR = "configs/finetune/upernet_own_data.py"


@pytest.fixture
def detector(tmp_path):
    """A config whose three parts are drawn; the evaluators name another file."""
    config = read_config(DETECTOR, "object_detection")
    config.work_dir = str(tmp_path / "work")
    for part in ("train", "val"):
        write_coco(tmp_path / part, 3)
    for part in ("train", "val", "test"):
        config[f"{part}_dataloader"].dataset.data_root = str(tmp_path)
    return config


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_sound_annotation_files_are_used_by_data_set_and_evaluator(detector, tmp_path):
    assert annotations.use_checked(detector, ("train", "val"), True) == []
    assert not (tmp_path / "work").exists()
    own = str(tmp_path / "val/annotations.json")
    assert detector.val_dataloader.dataset.ann_file == detector.val_evaluator.ann_file == own


def test_repaired_annotation_files_take_the_place_of_the_original(detector, tmp_path):
    edit(tmp_path / "val/annotations.json", lambda c: c["annotations"][0].update(id=0, area=0))
    before = (tmp_path / "val/annotations.json").read_bytes()
    lines = annotations.use_checked(detector, ("train", "val"), True)
    assert any("have no area above 0" in line for line in lines)
    assert any("new ids from 1 on" in line for line in lines)
    file = tmp_path / "work/val-annotations.json"
    assert detector.val_dataloader.dataset.ann_file == detector.val_evaluator.ann_file == str(file)
    assert min(a["id"] for a in json.loads(file.read_text())["annotations"]) == 1
    assert (tmp_path / "val/annotations.json").read_bytes() == before
    # images are found from the same root as before
    dataset = detector.val_dataloader.dataset
    dataset.pop("_scope_", None)
    assert (tmp_path / dataset.data_prefix.img).is_dir()


def test_repaired_files_of_one_part_do_not_overwrite_each_other(detector, tmp_path):
    own = detector.train_dataloader.dataset
    other = copy.deepcopy(own)
    other.ann_file = "val/annotations.json"
    detector.train_dataloader.dataset = {"type": "ConcatDataset", "datasets": [own, other]}
    for part in ("train", "val"):
        edit(tmp_path / part / "annotations.json", lambda c: c["annotations"][0].pop("area"))
    annotations.use_checked(detector, ("train",), True)
    sets = detector.train_dataloader.dataset.datasets
    assert sets[0].ann_file != sets[1].ann_file
    for dataset, part in zip(sets, ("train", "val"), strict=True):
        before, now = (
            json.loads((tmp_path / path).read_text())["annotations"]
            for path in (f"{part}/annotations.json", dataset.ann_file)
        )
        assert [a["bbox"] for a in now] == [a["bbox"] for a in before]


def test_classes_are_no_word(detector):
    detector.train_dataloader.dataset.metainfo.classes = "disc"
    with pytest.raises(UserError, match="classes is one word: write \\('disc',\\)"):
        annotations.use_checked(detector, ("train",), True)
    segmentor = read_config(OWN_SEGMENTOR, "semantic_segmentation")
    segmentor.train_dataloader.dataset.metainfo.classes = "thing"
    with pytest.raises(UserError, match="classes is one word: write \\('thing',\\)"):
        check_heads(segmentor, ("train",))


def test_heads_have_the_classes_of_the_data(detector):
    check_heads(detector, ("train", "val"))
    detector.model.roi_head.mask_head.num_classes = 80
    with pytest.raises(
        UserError, match=r"model\.roi_head\.mask_head\.num_classes is 80, the train data have 3"
    ):
        check_heads(detector, ("train",))
    segmentor = read_config(OWN_SEGMENTOR, "semantic_segmentation")
    check_heads(segmentor, ("train", "val", "test"))
    segmentor.model.auxiliary_head.num_classes = 19
    with pytest.raises(UserError, match="auxiliary_head.num_classes is 19, the test data have 4"):
        check_heads(segmentor, ("test",))


def test_one_class_needs_a_sigmoid():
    config = read_config(OWN_SEGMENTOR, "semantic_segmentation")
    heads = config.model.decode_head, config.model.auxiliary_head
    config.train_dataloader.dataset.metainfo = {"classes": ("thing",), "palette": [[0, 0, 0]]}
    for head in heads:
        head.num_classes = 1
    with pytest.raises(UserError, match="decode_head has one class, whose softmax is always 1"):
        check_heads(config, ("train",))
    for head in heads:
        head.out_channels, head.loss_decode.use_sigmoid = 1, True
    check_heads(config, ("train",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_epochs", "max_epochs: nothing reads it; set train_cfg.max_epochs"),
        ("data_root", "set train_dataloader.dataset.data_root"),
        ("optimizer.lr", "set optim_wrapper.optimizer.lr"),
        ("data.samples_per_gpu", "set train_dataloader.batch_size"),
        ("data.train.ann_file", "set train_dataloader.dataset.ann_file"),
        ("modle.backbone.arch", "did you mean model.backbone.arch?"),
        ("model.backbone.drop_path_rat", "did you mean model.backbone.drop_path_rate?"),
        ("classes", "the heads' num_classes"),
    ],
)
def test_options_that_nothing_reads(name, message):
    config = read_config(DETECTOR, "object_detection")
    with pytest.raises(UserError) as error:
        check_options(config, {name: 1})
    assert message in str(error.value)


def test_options_that_are_read():
    config = read_config(DETECTOR, "object_detection")
    names = ["model.backbone.depths", "train_dataloader.batch_size", "train_dataloader.pin_memory"]
    names += ["param_scheduler.1.end", "default_hooks.checkpoint.interval", "randomness.seed"]
    names += ["model.backbone.pretrained", "test_evaluator.format_only", "load_from", "work_dir"]
    check_options(config, dict.fromkeys(names, 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_epochs = 3", "nothing reads max_epochs; set train_cfg.max_epochs"),
        ("data = dict(samples_per_gpu=4)", "data.samples_per_gpu is train_dataloader.batch_size"),
        ("train_datalaoder = dict()", "did you mean train_dataloader?"),
        ("train_cfg = dict(max_epochs=3)", None),
        ("max_epochs = 3\ntrain_cfg = dict(max_epochs=max_epochs)", None),
        ("work_dir = f'runs/{_base_.max_epochs}'\n_unread = 3", None),
    ],
)
def test_names_in_files_that_nothing_reads(tmp_path, line, message):
    base = ROOT / "object_detection" / OWN_DETECTOR
    own = tmp_path / "own.py"
    own.write_text(f"_base_ = ['{base}']\n{line}\n")
    if message is None:
        check_files(own)
        read_config(str(own)).dump(tmp_path / "saved.py")  # holds data_root, classes, ...
        check_files(tmp_path / "saved.py")
    else:
        with pytest.raises(UserError, match=message):
            check_files(own)


def test_keys_of_loaders():
    config = read_config(DETECTOR, "object_detection")
    config.train_dataloader.pin_memory = True
    check_loaders(config)
    config.val_dataloader.batchsize = 2
    with pytest.raises(
        UserError, match=r"nothing reads val_dataloader\.batchsize; did you mean batch_size\?"
    ):
        check_loaders(config)


def test_pictures_show_the_truth_of_the_image():
    config = read_config(OWN_DETECTOR, "object_detection")
    kinds = [step.type for step in config.test_dataloader.dataset.pipeline]
    assert kinds.index("Resize") < kinds.index("LoadAnnotations")
    dataset = config.train_dataloader.dataset  # where they come first, for the training
    load_truth_last(dataset)
    kinds = [step["type"] for step in dataset.pipeline]
    assert kinds == [
        "LoadImageFromFile",
        "Resize",
        "LoadAnnotations",
        "RandomFlip",
        "PackDetInputs",
    ]


def test_a_copied_folder_has_its_own_best_checkpoint(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best_mIoU_iter_2.pth").touch()
    runner = SimpleNamespace(work_dir=str(tmp_path / "second"))
    saved = {"best_ckpt": str(tmp_path / "first/best_mIoU_iter_2.pth"), "best_score": 0.5}
    saved["last_ckpt"] = str(tmp_path / "first/iter_2.pth")
    checkpoint = {"message_hub": {"runtime_info": saved}}
    OwnFolder().after_load_checkpoint(runner, checkpoint)
    own = str(tmp_path / "second/best_mIoU_iter_2.pth")
    assert saved == {"best_ckpt": own, "best_score": 0.5}


def test_schedules_after_resuming_are_those_of_the_config(tmp_path):
    def trained(folder, iterations, end, *flags):
        settings = [f"train_cfg.max_iters={iterations}", "train_cfg.val_interval=100"]
        settings += ["default_hooks.checkpoint.interval=1", "param_scheduler.0.end=1"]
        settings += ["param_scheduler.1.begin=1", f"param_scheduler.1.end={end}"]
        command = [config, "--work-dir", str(folder), *flags, "--no-validate"]
        assert main("semantic_segmentation", "train", [*command, "--cfg-options", *settings]) == 0
        return read(str(folder / f"iter_{iterations}.pth"))

    config = small(SEGMENTOR.format("7x7"), tmp_path)
    whole = trained(tmp_path / "whole", 5, 8)
    trained(tmp_path / "part", 2, 2)
    resumed = trained(tmp_path / "part", 5, 8, "--resume")
    for one, other in zip(
        whole["optimizer"]["param_groups"], resumed["optimizer"]["param_groups"], strict=True
    ):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-9)
        assert one["lr"] > 0
    steps = [[s["last_step"] for s in state["param_schedulers"]] for state in (whole, resumed)]
    assert steps[0] == steps[1]


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(dense.folders, "print_log", lambda line, *_: lines.append(line))
    return lines


def folder_set(folder):
    register_all_modules()
    return FolderSegDataset(
        data_prefix={"img_path": str(folder / "images"), "seg_map_path": str(folder / "masks")},
        metainfo={"classes": ("ground", *SHAPES)},
        pipeline=[],
    )


def test_images_of_any_suffix_in_any_folder(tmp_path, told):
    folder = write_masks(tmp_path / "own", 4)
    images, masks = folder / "images", folder / "masks"
    (images / "0000.jpg").rename(images / "0000.JPG")
    Image.open(images / "0001.jpg").save(images / "0001.png")
    (images / "0001.jpg").unlink()
    for part, suffix in ((images, "jpg"), (masks, "png")):
        (part / "a").mkdir()
        (part / f"0002.{suffix}").rename(part / "a" / f"0003.{suffix}")
    dataset = folder_set(folder)
    found = {
        info["img_path"].removeprefix(f"{images}/"): info["seg_map_path"].removeprefix(f"{masks}/")
        for info in (dataset.get_data_info(i) for i in range(len(dataset)))
    }
    assert found == {
        "0000.JPG": "0000.png",
        "0001.png": "0001.png",
        "0003.jpg": "0003.png",
        "a/0003.jpg": "a/0003.png",
    }
    assert any("several suffixes: 1 .JPG, 1 .png, 2 .jpg" in line for line in told)
    (masks / "0000.png").unlink()
    assert len(folder_set(folder)) == 3
    assert any("1 images without a mask are left out: 0000.JPG" in line for line in told)
    shutil.copy(images / "0003.jpg", images / "0003.jpeg")
    with pytest.raises(UserError, match="have the same mask"):
        folder_set(folder)
    shutil.rmtree(masks)
    with pytest.raises(UserError, match="masks is not a folder"):
        folder_set(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_stages": 4}, "frozen_stages 4: from -1 to 3"),
        ({"frozen_stages": -2}, "frozen_stages -2"),
        ({"out_indices": (0, 4)}, r"out_indices \(0, 4\): from 0 to 3"),
        ({"out_indices": ()}, "out_indices"),
    ],
)
def test_stages_that_are_not_there(options, message):
    with pytest.raises(UserError, match=message):
        HorNet("atto_7x7", **options)


def test_an_image_smaller_than_the_stride():
    network = HorNet("atto_7x7", base_dim=16, depths=(1, 1, 1, 1))
    assert len(network(torch.zeros(1, 3, 32, 40))) == 4
    with pytest.raises(UserError, match="an image of 96 x 24 pixels: both sides need 32"):
        network(torch.zeros(1, 3, 24, 96))
