"""What people's own data and settings do: repaired, told, or refused in one line."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import mmdet
import mmseg
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from PIL import Image
from torch import nn

import dense.folders
import dense.loading
from dense import annotations
from dense.backbone import HorNet
from dense.classes import check_heads, check_widths
from dense.configs import read_config
from dense.folders import FolderSegDataset
from dense.loading import ConfigSchedules, OwnFolder, check_names, read
from dense.options import check_files, check_options, check_settings
from dense.run import leave_out_short, load_truth_last, main
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


def test_heads_inside_wrappers_and_of_other_kinds(detector):
    own = detector.train_dataloader.dataset
    other = copy.deepcopy(own)
    other.metainfo.classes = ("disc", "square")
    detector.train_dataloader.dataset = {"type": "ConcatDataset", "datasets": [own, other]}
    with pytest.raises(UserError, match="num_classes is 3, the train data have 2 classes"):
        check_heads(detector, ("train",))
    mosaic = {"type": "MultiImageMixDataset", "dataset": other, "pipeline": []}
    detector.train_dataloader.dataset = mosaic
    with pytest.raises(UserError, match="num_classes is 3, the train data have 2 classes"):
        check_heads(detector, ("train",))
    detector.train_dataloader.dataset = own
    detector.model.semantic_head = {"type": "FusedSemanticHead", "num_classes": 183}
    detector.model.rpn_head.num_classes = 1
    check_heads(detector, ("train",))
    detector.model.roi_head.bbox_head.loss_cls.class_weight = [1.0] * 81
    with pytest.raises(UserError, match=r"loss_cls\.class_weight has 81 numbers for 3 classes"):
        check_heads(detector, ("train",))
    own.metainfo.palette = [[0, 0, 0]]
    with pytest.raises(UserError, match="the palette has 1 colours for 3 classes"):
        check_heads(detector, ("train",))
    # mmdet has a data set of this name, too, with 8 classes
    segmentor = read_config(OWN_SEGMENTOR, "semantic_segmentation")
    segmentor.train_dataloader.dataset = {"type": "CityscapesDataset", "pipeline": []}
    for head in (segmentor.model.decode_head, segmentor.model.auxiliary_head):
        head.num_classes = 19
    check_heads(segmentor, ("train",))


def test_widths_of_the_maps(detector):
    check_widths(detector.model, [32, 64, 128, 256])
    message = r"neck\.in_channels is \[32, .* have \[64, 128, 256, 512"
    with pytest.raises(UserError, match=message):
        check_widths(detector.model, [64, 128, 256, 512])
    segmentor = read_config(OWN_SEGMENTOR, "semantic_segmentation").model
    check_widths(segmentor, [64, 128, 256, 512])
    segmentor.auxiliary_head.in_channels = 512
    with pytest.raises(UserError, match=r"auxiliary_head\.in_channels is 512"):
        check_widths(segmentor, [64, 128, 256, 512])


def test_classes_in_a_checkpoint(monkeypatch):
    lines = []
    monkeypatch.setattr(dense.loading, "print_log", lambda line, *_: lines.append(line))
    state = {"meta": {"dataset_meta": {"classes": ("cat", "dog")}}}
    check_names(state, ["cat", "dog"], "c.pth")
    check_names({"meta": {}}, ["cat", "dog"], "c.pth")
    assert not lines
    check_names(state, ["cat", "fox"], "c.pth")
    assert "was trained on the classes cat, dog, and is used for cat, fox" in lines[0]
    with pytest.raises(UserError, match=r"another order: write classes = \('cat', 'dog'\)"):
        check_names(state, ["dog", "cat"], "c.pth")


def test_evaluators_of_several_data_sets(detector, tmp_path):
    own = detector.val_dataloader.dataset
    other = copy.deepcopy(own)
    other.ann_file = "train/annotations.json"
    detector.val_dataloader.dataset = {"type": "ConcatDataset", "datasets": [own, other]}
    metrics = [{"type": "CocoMetric", "ann_file": str(tmp_path / part / "annotations.json")}
               for part in ("val", "train")]  # fmt: skip
    detector.val_evaluator = {"type": "MultiDatasetsEvaluator", "metrics": metrics}
    for part in ("train", "val"):
        edit(tmp_path / part / "annotations.json", lambda c: c["annotations"][0].update(id=0))
    annotations.use_checked(detector, ("val",), True)
    given = [metric.ann_file for metric in detector.val_evaluator.metrics]
    assert given == [d.ann_file for d in detector.val_dataloader.dataset.datasets]
    assert len({*given}) == 2
    # without a file of its own, an evaluator takes the truth of the images that it sees
    detector.val_dataloader.dataset = own
    detector.val_evaluator = {"type": "CocoMetric"}
    annotations.use_checked(detector, ("val",), True)
    assert "ann_file" not in detector.val_evaluator


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


def with_setting(config, name, value):
    check_options({name: value})
    config.merge_from_dict({name: value})
    check_settings(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_epochs", "max_epochs: nothing reads it; set train_cfg.max_epochs"),
        ("max_epoch", "max_epoch: nothing reads it; set train_cfg.max_epochs"),
        ("data_root", "set train_dataloader.dataset.data_root"),
        ("optimizer.lr", "set optim_wrapper.optimizer.lr"),
        ("data.samples_per_gpu", "set train_dataloader.batch_size"),
        ("data.train.ann_file", "set train_dataloader.dataset.ann_file"),
        ("modle.backbone.arch", "did you mean model.backbone.arch?"),
        ("model.backbone.out_indice", "did you mean out_indices?"),
        ("model.backbone.drop_path_rat", "did you mean drop_path_rate?"),
        ("model.backbone.anything", "nothing reads model.backbone.anything"),
        ("model.roi_head.bbox_head.num_clases", "did you mean num_classes?"),
        ("optim_wrapper.clip_gradient", "nothing reads optim_wrapper.clip_gradient"),
        ("optim_wrapper.optimizer.learning_rate", "optim_wrapper.optimizer.learning_rate"),
        ("param_scheduler.0.start_facter", "did you mean start_factor?"),
        ("default_hooks.checkpoint.intervall", "did you mean interval?"),
        ("train_cfg.max_epoch", "did you mean max_epochs?"),
        ("train_dataloader.batchsize", "did you mean batch_size?"),
        ("test_dataloader.dataset.datroot", "did you mean data_root?"),
        ("classes", "the heads' num_classes"),
    ],
)
def test_options_that_nothing_reads(name, message):
    config = read_config(DETECTOR, "object_detection")
    with pytest.raises(UserError, match=re.escape(message)):
        with_setting(config, name, 1)


def test_options_that_are_read():
    config = read_config(DETECTOR, "object_detection")
    names = ["model.backbone.depths", "train_dataloader.batch_size", "train_dataloader.pin_memory"]
    names += ["param_scheduler.1.end", "default_hooks.checkpoint.interval", "randomness.seed"]
    names += ["model.backbone.pretrained", "test_evaluator.format_only", "load_from", "work_dir"]
    names += ["find_unused_parameters", "sync_bn", "compile", "model.backbone.global_filters"]
    names += ["model.roi_head.bbox_head.loss_cls.class_weight", "default_hooks.logger.out_suffix"]
    for name in names:
        with_setting(copy.deepcopy(config), name, 1)


@pytest.mark.parametrize("package", [mmdet, mmseg], ids=["mmdet", "mmseg"])
def test_configs_of_others_are_not_refused(package):
    register_all_modules()
    seen = 0
    for path in sorted((Path(package.__file__).parent / ".mim/configs").rglob("*.py"))[::40]:
        try:
            config = Config.fromfile(path)
        except Exception:  # noqa: BLE001 - it needs what is not installed, or is no config
            continue
        if "model" in config and "train_dataloader" in config:
            check_settings(config)
            check_heads(config, ("train", "val", "test"))
            seen += 1
    assert seen > 10


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
    runner = SimpleNamespace(work_dir=str(tmp_path / "second"), hooks=[])
    saved = {"best_ckpt": str(tmp_path / "first/best_mIoU_iter_2.pth"), "best_score": 0.5}
    saved["last_ckpt"] = str(tmp_path / "first/iter_2.pth")
    checkpoint = {"message_hub": {"runtime_info": saved}}
    OwnFolder().after_load_checkpoint(runner, checkpoint)
    own = str(tmp_path / "second/best_mIoU_iter_2.pth")
    assert saved == {"best_ckpt": own, "best_score": 0.5}
    # another folder for checkpoints
    runner.hooks.append(CheckpointHook(out_dir=str(tmp_path / "out")))
    (tmp_path / "out/second").mkdir(parents=True)
    best = tmp_path / "out/second/best_mIoU_iter_2.pth"
    best.touch()
    OwnFolder().after_load_checkpoint(runner, checkpoint)
    assert saved["best_ckpt"] == str(best)


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


class Counts(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs, mode):
        return {"loss": self.weight.sum()}


def groups_after(folder, epochs, schedules, lr=0.1, **resumed):
    """The optimizer's group after so many epochs of two iterations."""
    data = {"dataset": [{"inputs": torch.ones(1)}] * 4, "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"}}  # fmt: skip
    optimizer = {"type": "SGD", "lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    wrapper = {"type": "OptimWrapper", "optimizer": optimizer}
    config = Config(
        {
            "optim_wrapper": wrapper,
            "param_scheduler": schedules,
            "load_from": None,
            "experiment_name": f"{folder.name}-{epochs}",
            "train_cfg": {"by_epoch": True, "max_epochs": epochs},
        }
    )
    runner = Runner(
        Counts(), str(folder), train_dataloader=data, train_cfg=config.train_cfg, cfg=config,
        optim_wrapper=wrapper, param_scheduler=schedules, experiment_name=config.experiment_name,
        custom_hooks=[ConfigSchedules()], default_scope="mmengine", **resumed,
    )  # fmt: skip
    runner.train()
    return runner.optim_wrapper.param_groups[0]


EVERY = {"by_epoch": True, "milestones": [1, 3, 4], "gamma": 0.5}


@pytest.mark.parametrize(
    "schedules",
    [
        [{"type": f"MultiStep{kind}", **EVERY} for kind in ("LR", "Momentum")],
        [{"type": "MultiStepMomentum", **EVERY}],
        [{"type": "MultiStepParamScheduler", "param_name": "weight_decay", **EVERY}],
        [
            {
                "type": "CosineAnnealingLR",
                "T_max": 5,
                "by_epoch": True,
                "convert_to_iter_based": True,
            }
        ],
    ],
)
def test_all_schedules_go_on_after_resuming(tmp_path, schedules):
    whole = groups_after(tmp_path / "whole", 4, schedules)
    groups_after(tmp_path / "part", 2, schedules)
    path = str(tmp_path / "part/epoch_2.pth")
    resumed = groups_after(tmp_path / "part", 4, schedules, resume=True, load_from=path)
    for name in ("lr", "momentum", "weight_decay"):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-12)


def test_a_new_rate_counts_after_resuming(tmp_path):
    schedules = [{"type": "MultiStepLR", **EVERY}]
    whole = groups_after(tmp_path / "whole", 4, schedules, lr=0.3)
    groups_after(tmp_path / "part", 2, schedules)
    path = str(tmp_path / "part/epoch_2.pth")
    resumed = groups_after(tmp_path / "part", 4, schedules, lr=0.3, resume=True, load_from=path)
    assert resumed["lr"] == pytest.approx(whole["lr"], rel=1e-12)


def test_a_warm_up_of_one_step_is_left_out():
    rest = {"type": "CosineAnnealingLR", "T_max": 9, "by_epoch": True}
    for length, converts, per_epoch, kept in (
        (1, True, 1, False), (1, True, 2, True), (1, False, 9, False), (2, False, 9, True),
    ):  # fmt: skip
        warm_up = {"type": "LinearLR", "begin": 0, "end": length, "by_epoch": converts}
        warm_up |= {"convert_to_iter_based": converts}
        schedules = [ConfigDict(step) for step in (warm_up, rest)]
        loop = SimpleNamespace(dataloader=range(per_epoch))
        runner = SimpleNamespace(param_schedulers=schedules, train_loop=loop, cfg=ConfigDict())
        assert (schedules[0] in leave_out_short(runner)) == kept


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(dense.folders, "print_log", lambda line, *_: lines.append(line))
    return lines


def folder_set(folder, suffix=".png", **options):
    register_all_modules()
    return FolderSegDataset(
        data_prefix={"img_path": str(folder / "images"), "seg_map_path": str(folder / "masks")},
        metainfo={"classes": ("ground", *SHAPES)},
        pipeline=[],
        seg_map_suffix=suffix,
        **options,
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
    shutil.copy(masks / "0003.png", masks / "0003.PNG")
    with pytest.raises(UserError, match="are of the same image: remove one"):
        folder_set(folder)
    (masks / "0003.PNG").unlink()
    assert len(folder_set(folder, ".PNG")) == 3  # in any case
    for path in masks.rglob("*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert len(folder_set(folder, "_mask.png")) == 3
    with pytest.raises(UserError, match="whole folders: leave out ann_file"):
        folder_set(folder, "_mask.png", ann_file="split.txt")
    shutil.copy(images / "0003.jpg", images / "0003.jpeg")
    with pytest.raises(UserError, match="have the same mask"):
        folder_set(folder, "_mask.png")
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
