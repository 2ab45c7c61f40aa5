"""Parameter groups, their order and scales, and the schedules."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401
from config.flags import OptimConfig, ScheduleConfig
from optim_factory import Schedule, create_optimizer, parameter_groups, warmup_cosine
from runtime.errors import UserError

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
    ours = [warmup_cosine(step, 4e-3, 1e-6, steps, warmup) for step in range(steps)]
    progress = np.arange(steps - warmup) / max(1, steps - warmup)
    cosine = 1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(ours, np.concatenate([np.linspace(0, 4e-3, warmup), cosine]))
    assert warmup_cosine(steps + 5, 4e-3, 1e-6, steps, warmup) == pytest.approx(1e-6)


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


def test_warmup_longer_than_training_is_refused():
    with pytest.raises(UserError, match="warmup_epochs"):
        Schedule(ScheduleConfig(epochs=3), weight_decay=0.05, steps_per_epoch=5)


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
