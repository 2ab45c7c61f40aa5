"""Parameter groups, their order and scales, and the schedules."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

import models  # noqa: F401
from config.flags import OptimConfig, ScheduleConfig
from optim_factory import Schedule, create_optimizer, parameter_groups, restore_optimizer
from runtime.errors import UserError
from training.state import Progress

LAYER_IDS = json.loads((Path(__file__).parents[1] / "golden/layer_ids.json").read_text())["ids"]


@pytest.fixture(scope="module")
def tiny():
    with torch.device("meta"):
        return timm.create_model("hornet_tiny_gf")


def test_groups_without_layer_decay_stand_in_order_of_appearance(tiny):
    decay, no_decay = parameter_groups(tiny, 0.05)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim > 1 for p in decay["params"])
    assert all(p.ndim == 1 for p in no_decay["params"])
    assert decay["params"][0] is tiny.downsample_layers[0][0].weight


def test_layer_decay_scales_as_recorded(tiny):
    groups = parameter_groups(tiny, 0.05, layer_decay=0.7)
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(tiny.named_parameters())
    assert len(scale_of) == len(names)
    for name, parameter in names.items():
        prefix = max((key for key in LAYER_IDS if name.startswith(key + ".")), key=len)
        assert math.isclose(scale_of[id(parameter)], 0.7 ** (13 - LAYER_IDS[prefix])), name


def test_layer_decay_groups_are_pairs_in_order_of_first_appearance(tiny):
    groups = parameter_groups(tiny, 0.05, layer_decay=0.7)
    assert len(groups) == 2 * 14
    # names come stem and downsampling layers first: ids 0, 2, 3, 12, then stage 0 (id 1), ...
    ids = [round(13 - math.log(group["lr_scale"], 0.7)) for group in groups[::2]]
    assert ids == [0, 2, 3, 12, 1, 4, 5, 6, 7, 8, 9, 10, 11, 13]


def test_frozen_parameters_and_no_weight_decay():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def no_weight_decay(self) -> set[str]:
            return {"a.weight"}

    net = Net()
    net.b.bias.requires_grad_(False)
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(net, 0.1)}
    assert [id(p) for p in groups[0.1]] == [id(net.b.weight)]
    assert {id(p) for p in groups[0.0]} == {id(net.a.weight), id(net.a.bias)}


@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 1), (50, 7), (50, 50)])
def test_schedule_equals_linspace_and_half_cosine(steps, warmup):
    schedule = _schedule(epochs=steps, warmup_epochs=warmup)
    ours = [schedule.learning_rate(step) for step in range(steps)]
    progress = np.arange(steps - warmup) / max(1, steps - warmup)
    cosine = 1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(ours, np.concatenate([np.linspace(0, 4e-3, warmup), cosine]))
    assert schedule.learning_rate(steps + 5) == pytest.approx(1e-6)


def _schedule(steps_per_epoch=1, **flags):
    return Schedule(ScheduleConfig(lr=4e-3, min_lr=1e-6, **flags), 0.05, steps_per_epoch)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("flags", "of_timm"),
    [
        (dict(sched="cosine"), dict(sched="cosine")),
        (dict(sched="linear"), dict(sched="poly", decay_rate=1.0)),
        (dict(sched="step", decay_epochs=7), dict(sched="step", decay_epochs=7)),
        (dict(sched="step", decay_rate=0.5), dict(sched="step", decay_rate=0.5, decay_epochs=8)),
        (dict(sched="wsd"), dict(sched="wsd", decay_epochs=8)),
        (dict(sched="wsd", decay_epochs=5), dict(sched="wsd", decay_epochs=5)),
        (dict(sched="constant"), dict(sched="constant")),
    ],
)
def test_courses_are_those_of_timm(flags, of_timm, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    if of_timm["sched"] in ("wsd", "constant"):
        pytest.importorskip("timm.scheduler.wsd_lr")
    theirs, _ = create_scheduler_v2(
        optimizer, **of_timm, num_epochs=40 - warmup, min_lr=1e-6, warmup_epochs=warmup,
        warmup_prefix=True, step_on_epochs=False, updates_per_epoch=3,
    )  # fmt: skip
    ours = _schedule(3, epochs=40, warmup_epochs=warmup, **flags)
    steps = range(3 * warmup, 120)
    rates = []
    for step in steps:
        theirs.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    if flags["sched"] == "wsd":  # of timm, the warm-up comes before num_epochs
        assert len({*rates}) > 1
    if flags["sched"] == "step":
        rates = [max(rate, 1e-6) for rate in rates]  # timm's has no smallest rate
    np.testing.assert_allclose([ours.learning_rate(s) for s in steps], rates, rtol=1e-12)


@pytest.mark.parametrize("sched", ["cosine", "linear", "wsd"])
def test_the_cooldown_follows_the_whole_course(sched):
    schedule = _schedule(3, epochs=20, warmup_epochs=2, sched=sched, cooldown_epochs=5)
    shorter = _schedule(3, epochs=15, warmup_epochs=2, sched=sched, decay_epochs=4)
    rates = [schedule.learning_rate(step) for step in range(60)]
    assert rates[:45] == [shorter.learning_rate(step) for step in range(45)]
    assert rates[45:] == [1e-6] * 15
    if sched == "cosine":  # the rates of epochs are late by one, but not those of the cooldown
        late = _schedule(3, epochs=20, warmup_epochs=2, cooldown_epochs=5, schedule_unit="epoch")
        assert [late.learning_rate(step) for step in range(60)][45:] == [1e-6] * 15


def test_plateau_is_torchs():
    accuracies = [10, 20, 20, 19, 30, 30, 30, 30, 29, 31, 31, 1, 2, 3, 4, 5, 6]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=2, threshold=0
    )
    config = ScheduleConfig(sched="plateau", decay_rate=0.5, patience_epochs=2)
    schedule = _schedule(1, epochs=20, warmup_epochs=0, sched="plateau")
    progress, best = Progress(), 0.0
    rates = []
    for accuracy in accuracies:
        progress.find_plateau(accuracy > best, config)
        best = max(best, accuracy)
        theirs.step(accuracy)
        rates.append(schedule.learning_rate(5, progress.rate_factor))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
    assert len({*rates}) == 4
    assert schedule.learning_rate(5, 1e-9) == 1e-6


def test_schedule_sets_rates_and_spares_groups_without_decay():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [weights[0]], "weight_decay": 0.05, "lr_scale": 1.0},
            {"params": [weights[1]], "weight_decay": 0.0, "lr_scale": 0.5},
        ]
    )
    config = ScheduleConfig(epochs=4, warmup_epochs=1, lr=1.0, weight_decay_end=0.2)
    schedule = Schedule(config, weight_decay=0.05, steps_per_epoch=5)
    schedule.apply(optimizer, 20)  # the end of both cosines
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-6, 0.5e-6])
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    "flags",
    [
        dict(epochs=3),
        dict(epochs=10, warmup_epochs=5, cooldown_epochs=6),
        dict(epochs=10, warmup_epochs=5, sched="wsd", decay_epochs=5.5),
    ],
)
def test_parts_longer_than_the_training_are_refused(flags):
    with pytest.raises(UserError, match=r"longer than the training \(\d+ epochs of 5 steps\)"):
        _schedule(5, **flags)


def test_warmup_steps_override_epochs():
    assert ScheduleConfig(warmup_steps=3).warmup(100) == 3
    assert ScheduleConfig(warmup_epochs=2).warmup(100) == 200


def test_optimizer_by_name():
    model = nn.Linear(2, 2)
    adamw = create_optimizer(OptimConfig(opt_betas=(0.8, 0.9), opt_eps=1e-6), model, 1e-3)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.9)
    assert adamw.defaults["eps"] == 1e-6
    assert (
        create_optimizer(OptimConfig(opt="sgd", opt_eps=None), model, 1e-3).defaults["momentum"]
        == 0.9
    )


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("adamww", "no such optimizer; near names: .*adamw"),
        ("qqqqqq", "no such optimizer$"),
        ("adahessian", "second-order"),
    ],
)
def test_optimizers_that_cannot_be_had(opt, message):
    with pytest.raises(UserError, match=message):
        create_optimizer(OptimConfig(opt=opt, opt_eps=None), nn.Linear(2, 2), 1e-3)


def test_layer_decay_has_a_floor(tiny):
    scales = {group["lr_scale"] for group in parameter_groups(tiny, 0.05, 0.7, layer_decay_min=0.1)}
    assert min(scales) == 0.1
    theirs = param_groups_layer_decay(tiny, layer_decay=0.7, min_scale=0.1)
    assert scales == {group["lr_scale"] for group in theirs}


@pytest.mark.parametrize(
    ("opt", "options"),
    [("muon", {"ns_steps": 3}), ("lamb", {"max_grad_norm": 1.0}), ("lion", {}), ("adan", {})],
)
def test_optimizers_and_their_options_are_timms(opt, options):
    torch.manual_seed(0)
    ours = timm.create_model("hornet_atto_gf", num_classes=3, base_dim=8)
    theirs = copy.deepcopy(ours)
    config = OptimConfig(opt=opt, opt_args=options, opt_eps=None, weight_decay=0.1)
    pairs = [
        (ours, create_optimizer(config, ours, 1e-3)),
        (theirs, create_optimizer_v2(theirs, opt, 1e-3, 0.1, **options)),
    ]
    images = torch.randn(2, 3, 224, 224)
    for model, optimizer in pairs:
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    weights = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_stepz": 3}, "--opt adamw: .*ns_stepz"),
        ({"lr": 1.0}, "lr is set here, or by a flag"),
        ({"fused": False, "layer_decay": 0.5}, "fused, layer_decay is set here"),
        ({"differentiable": True}, "--opt adamw: .*differentiable"),
    ],
)
def test_options_that_an_optimizer_does_not_have(options, message):
    with pytest.raises(UserError, match=message):
        create_optimizer(OptimConfig(opt_args=options), nn.Linear(2, 2), 1e-3)


def test_a_resumed_run_takes_the_options_of_its_flags():
    model = nn.Linear(2, 2)
    saved = create_optimizer(OptimConfig(opt="muon", opt_args={"ns_steps": 3}), model, 1)
    now = create_optimizer(OptimConfig(opt="muon", opt_args={"ns_steps": 4}), model, 1)
    restore_optimizer(now, saved.state_dict(), {"ns_steps"})
    assert {group["ns_steps"] for group in now.param_groups} == {4}
