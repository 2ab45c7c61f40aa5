"""Flags that reach the model and its training, and what a checkpoint restores."""

import copy
import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import models  # noqa: F401
from config.command_line import parse_args
from models.fast.layers import LeanBlock
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from training.build import build_model, build_training, continue_schedules, prepare_model
from utils import gmacs_by_module, stream_seed

CPU = DistributedContext(0, 0, 1, torch.device("cpu"))
ZOO = json.loads((Path(__file__).parents[1] / "golden/model_zoo.json").read_text())["models"]
SMALL = ["--model=hornet_atto_7x7", '--model_kwargs={"base_dim": 16, "depths": [1, 1, 2, 1]}']


def training_of(*flags, images=64):
    config = parse_args([*SMALL, "--batch_size=8", "--warmup_epochs=0", *flags])
    return build_training(config, build_model(config.model, 4), images, 4, CPU)


def state_of(*flags, **options):
    return training_of(*flags, **options)[0]


def setup_of(*flags, **options):
    return training_of(*flags, **options)[1]


def test_model_flags_reach_the_model():
    flags = ["--drop_path=0.4", "--layer_scale_init_value=0.3", "--head_init_scale=0"]
    model = build_model(parse_args([*SMALL, *flags]).model, 4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for s in model.stages for block in s]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.stages[0][0].gamma1.unique().item() == pytest.approx(0.3)
    assert model.head.weight.abs().max() == 0
    assert model.head.out_features == 4


@pytest.mark.parametrize("name", ["vgg11", "convnext_atto"])
def test_other_models_of_timm(name):
    with torch.device("meta"):
        model = build_model(parse_args([f"--model={name}"]).model, 7)
    assert model.num_classes == 7


@pytest.mark.parametrize("kwargs", ['{"pretrained": true}', '{"width": 1}', '{"base_dim": 7}'])
def test_model_that_cannot_be_built_is_one_line(kwargs):
    config = parse_args(["--model=hornet_atto_7x7", f"--model_kwargs={kwargs}"])
    with pytest.raises(UserError, match="hornet_atto_7x7 cannot be built"):
        build_model(config.model, 4)


def test_loss_follows_mixup():
    assert isinstance(setup_of().criterion, SoftTargetCrossEntropy)
    hard = setup_of("--mixup=0", "--cutmix=0", "--smoothing=0.2")
    assert isinstance(hard.criterion, LabelSmoothingCrossEntropy)
    assert hard.criterion.smoothing == 0.2
    assert hard.mixup is None


def test_ema_can_be_kept_in_host_memory():
    state = state_of("--model_ema=true", "--model_ema_force_cpu=true", "--model_ema_decay=0.5")
    assert next(state.ema.module.parameters()).device.type == "cpu"
    assert state.ema.decay == 0.5
    assert state_of().ema is None


def test_layout_of_the_weights():
    def stem(*flags):
        config = parse_args([*SMALL, *flags])
        model = prepare_model(build_model(config.model, 4), config.compute, CPU.device)
        return model.downsample_layers[0][0].weight

    assert stem().is_contiguous(memory_format=torch.channels_last)
    assert not stem().is_contiguous()
    assert stem("--channels_last=false").is_contiguous()


def test_lean_memory_reaches_the_stages():
    config = parse_args([*SMALL, "--memory=lean"])
    model = prepare_model(build_model(config.model, 4), config.compute, torch.device("cpu"))
    assert all(type(block) is LeanBlock for stage in model.stages for block in stage)
    with pytest.raises(UserError, match="--memory lean: this model can't"):
        prepare_model(torch.nn.Linear(2, 2), config.compute, torch.device("cpu"))


def test_gradient_checkpointing_reaches_the_stages():
    config = parse_args([*SMALL, "--grad_checkpointing=true"])
    model = prepare_model(build_model(config.model, 4), config.compute, CPU.device)
    assert all(stage.grad_checkpointing for stage in model.stages)
    config = parse_args(["--model=vgg11", "--grad_checkpointing=true"])
    with torch.device("meta"):
        vgg = build_model(config.model, 4)
    with pytest.raises(UserError, match="--grad_checkpointing true: this model can't"):
        prepare_model(vgg, config.compute, CPU.device)


@pytest.mark.parametrize(
    "name", ["lamb", "lion", "nadamw", "muon", "adamc", "lookahead_sgd", "sgd", "novograd"]
)
def test_other_optimizers_train_and_resume(name):
    first = stepped(f"--opt={name}", "--opt_eps=null")
    second = state_of(f"--opt={name}", "--opt_eps=null")
    second.load_state_dict(first.state_dict(CPU) | {"epoch": 0}, "file", CPU)
    left, right = first.optimizer.state_dict(), second.optimizer.state_dict()
    torch.testing.assert_close(left["state"], right["state"])
    assert any(left["state"].values())


def stepped(*flags):
    state, setup = training_of(*flags)
    setup.schedule.apply(state.optimizer, 1)
    state.model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    state.optimizer.step()
    return state


def ema_of(what):
    ema = stepped("--model_ema=true").state_dict(CPU)["model_ema"]
    if what == "shape":
        return ema | {"head.weight": torch.ones(7, 7)}
    if what == "nan":
        return ema | {"head.bias": torch.full_like(ema["head.bias"], torch.nan)}
    return {"lacks": {"head.weight": ema["head.weight"]}, "no weights": {"a": 1}}[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"file \(model_ema\) is of another model: it has another shape of head.weight"),
        ("lacks", r"file \(model_ema\) is of another model: it lacks"),
        ("nan", r"file \(model_ema\) can't be used: not finite: head.bias"),
        ("no weights", "file: its model_ema has no weights"),
    ],
)
def test_an_ema_of_another_model_is_refused(what, message):
    state = stepped("--model_ema=true")
    saved = state.state_dict(CPU) | {"epoch": 0, "model_ema": ema_of(what)}
    with pytest.raises(UserError, match=message):
        state.load_state_dict(saved, "file", CPU)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("exp_avg", torch.ones(3)),
        ("exp_avg_sq", None),
        ("exp_avg", torch.nan),
        ("step", torch.tensor(torch.inf)),
    ],
)
def test_a_damaged_optimizer_is_refused(entry, value):
    state = stepped()
    saved = copy.deepcopy(state.state_dict(CPU)) | {"epoch": 0}
    whole = saved["optimizer"]["state"][0][entry]
    changed = value if not isinstance(value, float) else torch.full_like(whole, value)
    saved["optimizer"]["state"][0][entry] = changed
    with pytest.raises(UserError, match="file has another optimizer"):
        state.load_state_dict(saved, "file", CPU)


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (["--opt=adamw"], ["--opt=adam"], "decoupled_weight_decay"),
        (["--opt=sgd"], ["--opt=momentum"], "nesterov"),
        (["--weight_decay=0"], ["--weight_decay=0.1"], "weight_decay"),
    ],
)
def test_other_flags_of_the_optimizer_count(before, after, name):
    saved = stepped(*before).state_dict(CPU) | {"epoch": 0}
    old = [group[name] for group in saved["optimizer"]["param_groups"]]
    state = state_of(*after)
    wanted = [group[name] for group in state.optimizer.param_groups]
    state.load_state_dict(saved, "file", CPU)
    assert [group[name] for group in state.optimizer.param_groups] == wanted
    assert wanted != old


@pytest.mark.parametrize("scale", ["x", 0.0, torch.nan])
def test_a_damaged_loss_scale_is_refused(scale):
    state = stepped("--use_amp=true", "--amp_dtype=float16")
    saved = state.state_dict(CPU) | {"epoch": 0}
    saved["scaler"]["scale"] = scale
    with pytest.raises(UserError, match="file has another optimizer"):
        state.load_state_dict(saved, "file", CPU)


def test_settings_of_the_optimizer_follow_the_flags():
    saved = stepped("--opt_betas", "0.9", "0.95").state_dict(CPU) | {"epoch": 0}
    state = state_of("--opt_betas", "0.8", "0.99")
    state.load_state_dict(saved, "file", CPU)
    assert {tuple(group["betas"]) for group in state.optimizer.param_groups} == {(0.8, 0.99)}
    assert state.optimizer.state_dict()["state"]


def test_start_epoch_moves_the_schedules():
    state = state_of("--start_epoch=3")
    assert (state.progress.epoch, state.progress.step) == (2, 3 * 8)


def test_resume_with_another_total_batch_keeps_the_schedule_in_epochs(caplog):
    first, first_setup = training_of("--epochs=4")
    first.progress.epoch, first.progress.step = 1, 16
    second, second_setup = training_of("--epochs=4", "--update_freq=4")
    with caplog.at_level(logging.INFO):
        second.load_state_dict(first.state_dict(CPU), "file", CPU)
        continue_schedules(second, second_setup, "file", knows_step=True)
    assert second.progress.step == 2 * 2
    assert "had other steps per epoch" in caplog.text
    pairs = ((first, first_setup), (second, second_setup))
    rates = [setup.schedule.learning_rate(state.progress.step) for state, setup in pairs]
    assert rates[0] == pytest.approx(rates[1])


def test_the_end_of_an_epoch_is_its_end_with_another_batch_too():
    first = state_of("--batch_size=10", images=100)
    first.progress.epoch, first.progress.step, first.progress.position = 1, 30, 100
    second, setup = training_of("--batch_size=12", images=100)
    second.load_state_dict(first.state_dict(CPU), "file", CPU)
    continue_schedules(second, setup, "file", knows_step=True)
    assert second.progress.step == 3 * 8  # 8 batches of 12 images per epoch
    assert setup.steps_taken(second.progress) == 8


def test_rates_follow_the_total_batch_on_request():
    flags = ["--lr=1e-3", "--min_lr=1e-5", "--update_freq=2"]
    assert setup_of(*flags).schedule.learning_rate(0) == pytest.approx(1e-3)
    schedule = setup_of(*flags, "--lr_base_batch=64").schedule  # the total batch is 16
    assert schedule.learning_rate(0) == pytest.approx(0.25e-3)
    assert schedule.learning_rate(10**6) == pytest.approx(0.25e-5)


def test_mixup_is_left_out_where_classes_are_small():
    assert setup_of("--mixup_min_images=16", images=64).mixup is not None
    few = setup_of("--mixup_min_images=17", images=64)
    assert few.mixup is None
    assert isinstance(few.criterion, LabelSmoothingCrossEntropy)


def test_means_of_an_epoch_that_goes_on_with_other_processes():
    state = state_of()
    sums = torch.tensor([[6.0, 3, 4, 10, 2]] * 2, dtype=torch.float64)
    # two ranks, each with half of the images, and both with the norms of the two steps
    saved = state.state_dict(CPU) | {"meters": torch.stack((sums, sums))}
    state.load_state_dict(saved, "file", CPU)
    assert state.meters.epoch.tolist() == [12, 6, 8, 10, 2]
    assert state.meters.of_epoch() == {"loss": 1.5, "class_acc": 75, "grad_norm": 5}


def test_frozen_parameters_do_not_change():
    flags = ["--layer_decay=0.5", "--layer_scale_init_value=0.5"]
    state = state_of("--freeze=(?!head|stages.3)", *flags)
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    state.model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    state.optimizer.step()
    changed = {name for name, p in state.model.named_parameters() if not p.equal(before[name])}
    left = {name for name in before if name.startswith(("head.", "stages.3."))}
    assert {"head.weight", "stages.3.0.pwconv2.weight"} <= changed <= left
    assert {name for name, p in state.model.named_parameters() if p.requires_grad} == left


@pytest.mark.parametrize(
    ("pattern", "message"), [("tail", "no parameter"), ("", None), (".", "all")]
)
def test_pattern_that_freezes_none_or_all(pattern, message):
    if message is None:
        assert all(p.requires_grad for p in state_of(f"--freeze={pattern}").model.parameters())
        return
    with pytest.raises(UserError, match=f"--freeze {pattern}: {message}.*head.bias"):
        training_of(f"--freeze={pattern}")


@pytest.mark.parametrize("damage", [{"epoch": "best"}, {"optimizer": None}, {"max_accuracy": "x"}])
def test_state_that_cannot_be_resumed_is_one_line(damage):
    state = state_of()
    with pytest.raises(UserError, match="cannot be resumed"):
        state.load_state_dict(state.state_dict(CPU) | damage, "file", CPU)


def test_weights_that_are_not_finite_are_not_saved():
    state = state_of()
    with torch.no_grad():
        state.model.stages[2][0].gamma1[3] = float("inf")
    with pytest.raises(
        UserError, match=r"^stages\.2\.0\.gamma1 is not finite after step 0: .*intact"
    ):
        state.state_dict(CPU)


def test_optimizer_state_of_older_torch_is_taken():
    state = state_of()
    saved = state.state_dict(CPU)
    published = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad", "lr_scale"}
    for group in saved["optimizer"]["param_groups"]:
        for name in group.keys() - published:
            del group[name]
    state.load_state_dict(saved, "file", CPU)
    assert all(group["decoupled_weight_decay"] for group in state.optimizer.param_groups)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if "tiny" in n else pytest.mark.slow) for n in ZOO]
)
def test_multiply_adds_are_the_recorded_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    recorded = ZOO[name]
    products, transforms = gmacs_by_module(model, recorded["input_size"])[""]
    assert products == pytest.approx(recorded["gmacs"], abs=1e-3)
    assert transforms == pytest.approx(recorded["gmacs_fft"], abs=1e-4)
    assert sum(gmacs_by_module(model, recorded["input_size"])[""]) == products + transforms


def test_every_process_and_epoch_has_its_own_seed():
    numbers = [(s, e, r) for s in (0, 1) for e in (0, 1) for r in (0, 1)]
    seeds = {stream_seed(kind, *n) for n in numbers for kind in ("epoch", "step")}
    assert len(seeds) == 16
    assert stream_seed("step", 3, 2, 1) == stream_seed("step", 3, 2, 1)
