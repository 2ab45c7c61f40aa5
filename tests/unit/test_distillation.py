"""Teachers and the losses against them: timm's as the peer."""

import copy

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401
from checkpoints.run_folder import save_checkpoint
from config.command_line import parse_args
from config.flags import DistillConfig
from inference.teacher import load_distillation
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError
from training.build import build_training
from training.distillation import Distillation, Student, Teacher

CLASSES = ["cat", "dog", "owl"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def small(name="hornet_atto_7x7", classes=3, **kwargs):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=classes, base_dim=16, depths=(1, 1, 1, 1), **kwargs)


def pair():
    """A student, a teacher that is normalised otherwise, images and labels."""
    teacher = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1), dims=(8,) * 4)
    teacher.pretrained_cfg = {"mean": INCEPTION[0], "std": INCEPTION[1]}
    nn.init.normal_(teacher.head.fc.weight)
    return small(), teacher, torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 1.0), (0.8, 4.0)])
def test_soft_is_timms(alpha, temperature):
    student, network, images, labels = pair()
    task = pytest.importorskip("timm.task")
    theirs = task.LogitDistillationTask(
        student, copy.deepcopy(network), nn.CrossEntropyLoss(), task_loss_weight=1 - alpha,
        temperature=temperature,
    )(images, labels)  # fmt: skip
    config = DistillConfig("x", distill_alpha=alpha, distill_temperature=temperature)
    ours = Distillation(Teacher(network, 32, IMAGENET, INCEPTION, [0, 1, 2]), config)
    logits = student(images)
    loss = ours.loss(nn.CrossEntropyLoss()(logits, labels), logits, ours.targets(images))
    torch.testing.assert_close(loss, theirs["loss"])
    assert abs(theirs["kd_loss"]) > 1e-3


def test_features_are_timms():
    student, network, images, labels = pair()
    tasks = pytest.importorskip("timm.task")
    ours = Distillation(
        Teacher(network, 32, IMAGENET, INCEPTION, [0, 1, 2]), DistillConfig("x", "features", 0.4)
    )
    task = tasks.FeatureDistillationTask(
        student, copy.deepcopy(network), nn.CrossEntropyLoss(), task_loss_weight=0.6
    )
    wrapped = Student(student, ours.teacher.num_features)
    wrapped.projection.load_state_dict(task.trainable_module.projection.state_dict())
    logits, features = wrapped(images)
    loss = ours.loss(nn.CrossEntropyLoss()(logits, labels), features, ours.targets(images))
    torch.testing.assert_close(loss, task(images, labels)["loss"])


def test_hard_is_cross_entropy_to_the_teachers_class():
    outputs, targets = torch.randn(5, 3), torch.randn(5, 3)
    ours = Distillation(None, DistillConfig("x", "hard", 0.25))
    expected = 0.75 * 2 - 0.25 * outputs.log_softmax(1)[range(5), targets.argmax(1)].mean()
    torch.testing.assert_close(ours.loss(torch.tensor(2.0), outputs, targets), expected)


def test_a_teacher_sees_its_own_size_and_stays_as_it_is():
    seen = []

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            seen.append(images)
            return self.norm(images).mean((2, 3))

    teacher = Teacher(Sees(), 48, IMAGENET, INCEPTION, [2, 0, 1]).train()
    grey = (0.25 - torch.tensor(IMAGENET[0])) / torch.tensor(IMAGENET[1])
    logits = teacher(grey[None, :, None, None].expand(2, 3, 32, 32))
    assert seen[0].shape == (2, 3, 48, 48)
    torch.testing.assert_close(seen[0], torch.full((2, 3, 48, 48), -0.5))
    assert logits.shape == (2, 3)
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher.model.norm.running_mean, torch.zeros(3))
    assert not any(p.requires_grad for p in teacher.parameters())


def save(path, classes, **flags):
    config = dict(model="hornet_atto_7x7", data_set="image_folder", input_size=32,
                  model_kwargs={"base_dim": 16, "depths": [1, 1, 1, 1]})  # fmt: skip
    named = {"classes": classes} if isinstance(classes, list) else {}
    count = len(classes) if named else classes
    content = {"model": small(classes=count).state_dict(), "args": config | flags, **named}
    save_checkpoint(content, path)
    return str(path)


def load(source, *flags, classes=CLASSES):
    data = ["--data_set", "image_folder", "--teacher", source]
    return load_distillation(parse_args([*data, *flags]), classes, SINGLE_PROCESS)


def test_logits_are_in_the_order_of_the_data(tmp_path):
    source = save(tmp_path / "t.pth", ["owl", "bee", "cat", "dog"])
    images = torch.randn(2, 3, 32, 32)
    logits = small(classes=4).eval()(images)[:, [2, 3, 0]]
    torch.testing.assert_close(load(source).targets(images), logits, rtol=1e-4, atol=1e-5)
    assert load("") is None
    unnamed = save(tmp_path / "u.pth", 3)
    assert load(unnamed).teacher.rows.tolist() == [0, 1, 2]


def test_a_model_of_timm_by_name(monkeypatch):
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return timm.models.resnet18()

    monkeypatch.setattr("inference.teacher.timm.create_model", create)
    teacher = load("resnet18.a1_in1k", classes=["n01443537", "n01440764"]).teacher
    assert asked == [("resnet18.a1_in1k", True)]
    assert (teacher.size, teacher.rows.tolist()) == ((224, 224), [1, 0])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["owl", "cat", "cow"], r"has 3 classes \(owl, cat, cow\), the data 3 .* lacks dog"),
        (5, "has 5 classes .* the data 3"),
    ],
)
def test_teachers_of_other_classes_are_refused(tmp_path, classes, message):
    with pytest.raises(UserError, match=f"--teacher .*{message}"):
        load(save(tmp_path / "t.pth", classes))


def test_wrong_teachers(tmp_path):
    (tmp_path / "t.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"--teacher: checkpoint .*t.pth cannot be read"):
        load(str(tmp_path / "t.pth"))
    with pytest.raises(UserError, match="--teacher: there is neither a file nor published weights"):
        load("no_such_model")


def test_a_projection_is_trained_beside_the_model(tmp_path):
    distillation = load(save(tmp_path / "t.pth", CLASSES), "--distill=features")
    flags = ["--batch_size=8", "--warmup_epochs=0", "--layer_decay=0.5", "--model_ema=true"]
    model = small()
    state, _ = build_training(
        parse_args(flags), model, 8, 3, SINGLE_PROCESS, distillation=distillation
    )
    assert state.bare_model is model
    groups = state.optimizer.param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in state.model.parameters()}
    scales = {
        g["lr_scale"] for g in groups for p in g["params"] if p is state.model.projection.bias
    }
    assert scales == {1.0}
    saved = copy.deepcopy(state.state_dict(SINGLE_PROCESS))
    assert saved["model"].keys() == saved["model_ema"].keys() == model.state_dict().keys()
    nn.init.zeros_(state.model.projection.weight)
    state.load_state_dict(saved | {"epoch": 0}, "file", SINGLE_PROCESS)
    assert torch.equal(state.model.projection.weight, saved["projection"]["weight"])
    with pytest.raises(UserError, match="file is not of a run with --distill features"):
        state.load_state_dict({n: v for n, v in saved.items() if n != "projection"} | {"epoch": 0},
                              "file", SINGLE_PROCESS)  # fmt: skip
