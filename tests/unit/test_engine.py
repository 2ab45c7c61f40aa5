"""Training steps and evaluation against arithmetic done another way."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision import transforms

import models
from config.command_line import parse_args
from engine import evaluate, train_one_epoch, train_step
from evaluation import Views, evaluate_epoch, mean_class_accuracy
from runtime.distributed import SINGLE_PROCESS, DistributedContext
from runtime.errors import UserError
from runtime.logging import Throughput
from tests.golden import trajectories
from training.build import build_model, build_training
from training.nonfinite import NonFiniteError

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = DistributedContext(0, 0, 1, torch.device("cpu"))
SMALL = [
    "--model=hornet_atto_7x7",
    '--model_kwargs={"base_dim": 16, "depths": [1, 1, 2, 1]}',
    "--input_size=32",
    "--layer_scale_init_value=0.5",
    "--mixup=0",
    "--cutmix=0",
    "--epochs=2",
    "--warmup_epochs=0",
    "--lr=1e-3",
]


def small_training(*flags, steps=3, classes=4):
    config = parse_args([*SMALL, *flags])
    torch.manual_seed(0)
    model = models.accelerate(build_model(config.model, classes).double())
    images = steps * config.total_batch(1)
    return build_training(config, model, images, classes, CPU)


def batches(count, size, classes=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def joined(micro_batches, group):
    return [
        tuple(torch.cat(parts) for parts in zip(*micro_batches[i : i + group], strict=True))
        for i in range(0, len(micro_batches), group)
    ]


def assert_same_weights(left, right):
    for name, weight in left.state_dict().items():
        torch.testing.assert_close(weight, right.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clip", [[], ["--clip_grad=0.5"]])
def test_accumulation_equals_one_large_batch(clip):
    micro = batches(6, 4)
    accumulated, setup = small_training("--batch_size=4", "--update_freq=2", *clip)
    large, large_setup = small_training("--batch_size=8", *clip)
    ours = train_one_epoch(accumulated, setup, micro)
    theirs = train_one_epoch(large, large_setup, joined(micro, 2))
    assert_same_weights(accumulated.model, large.model)
    for name in ("loss", "grad_norm", "class_acc", "lr"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-9), name
    assert accumulated.progress.step == 3


def test_micro_clipping_bounds_the_running_sum():
    """Each micro-batch's sum so far is clipped: an SGD step cannot move further than lr x clip."""
    micro = batches(2, 4)
    flags = [
        "--opt=momentum",
        "--momentum=0",
        "--weight_decay=0",
        "--opt_eps=null",
        "--update_freq=2",
    ]
    moved = {}
    for mode in ("micro", "step"):
        flags_of_mode = [*flags, "--batch_size=4", "--clip_grad=0.01", f"--clip_mode={mode}"]
        state, setup = small_training(*flags_of_mode, steps=1)
        before = [p.detach().clone() for p in state.model.parameters()]
        train_one_epoch(state, setup, micro)
        after = list(state.model.parameters())
        moved[mode] = torch.cat([(b - a).flatten() for b, a in zip(before, after, strict=True)])
    for moves in moved.values():
        assert moves.norm().item() == pytest.approx(1e-3 * 0.01, rel=1e-3)
    assert (moved["micro"] - moved["step"]).norm() > 0.01 * moved["step"].norm()


@pytest.mark.parametrize("warmup", [False, True])
def test_emas_follow_their_formula(warmup):
    state, setup = small_training(
        *("--batch_size=4", "--model_ema=true", "--model_ema_decay=0.7", "--model_ema_more=[0.2]"),
        f"--model_ema_warmup={str(warmup).lower()}",
    )
    start = state.model.head.weight.detach().clone()
    seen = []
    state.optimizer.register_step_post_hook(
        lambda *_: seen.append(state.model.head.weight.detach().clone())
    )
    train_one_epoch(state, setup, batches(3, 4))
    assert len(seen) == 3
    for name, largest in (("ema", 0.7), ("ema_0.2", 0.2)):
        average = start
        for step, weight in enumerate(seen):
            decay = min(largest, 1 - (1 + step) ** (-2 / 3)) if warmup else largest
            average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(state.emas[name].module.head.weight, average)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_follows_float32(dtype):
    """Same weights and batches: losses and updates differ by the rounding of the half type."""
    runs = []
    for flags in ([], ["--use_amp=true", f"--amp_dtype={dtype}"]):
        state, setup = small_training("--batch_size=8", "--clip_grad=1", *flags, steps=6)
        state.model.float()
        start = state.model.head.weight.detach().clone()
        data = [(images.float(), labels) for images, labels in batches(6, 8)]
        metrics = train_one_epoch(state, setup, data)
        assert setup.precision == (getattr(torch, dtype) if flags else None)
        runs.append((metrics["loss"], state.model.head.weight.detach() - start, state))
    (loss, moved, plain), (mixed_loss, mixed_moved, mixed) = runs
    assert plain.scaler is None
    assert (mixed.scaler is not None) == (dtype == "float16")
    assert mixed_loss != loss
    assert mixed_loss == pytest.approx(loss, rel=1e-2)
    assert (mixed_moved - moved).norm() < 0.3 * moved.norm()
    assert mixed.model.head.weight.dtype == torch.float32


def test_overflow_in_float16_skips_the_step_and_lowers_the_scale():
    state, setup = small_training("--batch_size=4", "--use_amp=1", "--amp_dtype=float16", steps=1)
    state.model.float()
    before = state.model.head.weight.detach().clone()
    state.model.head.weight.register_hook(lambda grad: grad * float("inf"))
    scale = state.scaler.get_scale()
    train_one_epoch(state, setup, [(images.float(), labels) for images, labels in batches(1, 4)])
    assert torch.equal(state.model.head.weight, before)
    assert state.scaler.get_scale() == scale / 2
    assert state.state_dict(CPU)["scaler"]["scale"] == scale / 2


def test_metrics_are_means_over_images():
    flags = ["--batch_size=4", "--lr=1e-30", "--min_lr=0", "--smoothing=0", "--log_interval=2"]
    state, setup = small_training(*flags)
    data = batches(3, 4)
    metrics = train_one_epoch(state, setup, data)
    images, labels = joined(data, 3)[0]
    with torch.no_grad():
        logits = state.model.eval()(images)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert metrics["class_acc"] == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean().item()
    )


@pytest.mark.parametrize(
    ("opt", "flags"), [("adamw", []), ("nadamw", []), ("sgd", ["--model_ema=true"])]
)
def test_a_step_without_a_finite_gradient_is_left_out(caplog, opt, flags):
    state, setup = small_training("--batch_size=4", f"--opt={opt}", *flags)
    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    data = batches(3, 4)
    data[1][0][0, 0, 0, 0] = float("nan")
    metrics = train_one_epoch(state, setup, data)
    assert "1 non-finite steps skipped so far, the last: step 1" in caplog.text
    # as if the batch had not been there, but for the rates, which follow the number of the step
    other, setup = small_training("--batch_size=4", f"--opt={opt}", *flags)
    other.model.load_state_dict(start)
    for step in (0, 2):
        other.progress.step = step
        setup.schedule.apply(other.optimizer, step)
        train_step(other, setup, iter([data[step]]), Throughput())
    assert metrics["loss"] == pytest.approx(other.meters.end_line()["loss"])
    for name, weight in state.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


def test_an_epoch_without_a_good_step_has_no_loss():
    state, setup = small_training("--batch_size=4")
    data = [(images * math.nan, labels) for images, labels in batches(3, 4)]
    metrics = train_one_epoch(state, setup, data)
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["grad_norm"])


def test_too_many_steps_without_a_finite_gradient_end_the_run():
    state, setup = small_training("--batch_size=4", "--max_bad_steps=2", steps=4)
    data = batches(4, 4)
    for index in (0, 2, 3):
        data[index][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match="not finite in 2 steps in a row, the last of them step 3"
    ) as run:
        train_one_epoch(state, setup, data)
    report = run.value.report
    assert report["step"] == 3
    assert report["learning_rate"] == setup.schedule.learning_rate(3)
    assert report["gradient_norms"].keys() == dict(state.model.named_parameters()).keys()
    assert "nan" in report["gradient_norms"].values()
    assert all(weight.isfinite().all() for weight in state.model.state_dict().values())


def test_random_numbers_differ_between_ranks_steps_and_micro_batches():
    drawn = []
    for rank in range(2):
        state, setup = small_training("--batch_size=4", "--update_freq=2")
        setup = replace(setup, context=DistributedContext(rank, rank, 2, torch.device("cpu")))
        state.model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(()).item()))
        for _ in range(2):
            train_step(state, setup, iter(batches(2, 4)), Throughput())
            state.progress.step += 1
    assert len(set(drawn)) == 2 * 2 * 2


def test_evaluation_is_without_dropout_and_with_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.9), nn.Linear(12, 4))
    images, labels = torch.randn(16, 3, 2, 2), torch.randint(0, 4, (16,))
    expected = copy.deepcopy(model).eval()(images)
    metrics, rows = evaluate(model.train(), [(images, labels)], CPU)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(expected, labels).item())
    torch.testing.assert_close(rows[:, 2].float(), expected.softmax(1).amax(1))
    assert torch.equal(model[1].running_mean, torch.zeros(12))


def test_on_a_tie_the_later_checkpoint_is_the_best():
    state, setup = small_training("--model_ema=true", "--model_ema_eval=true")

    class Ties:
        def of(self, *_):
            return {"acc1": 50.0, "acc5": 100.0, "loss": 1.0}, None

    for _ in range(2):
        record, improved = evaluate_epoch(state, setup, Ties(), lambda: None)
        assert improved == ["best", "best-ema"]
        assert (record["max_accuracy"], record["max_ema_accuracy"]) == (50.0, 50.0)


def test_evaluation_counts_each_image_once():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x.flatten(1)

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(10, 7, generator=generator)
    labels = torch.randint(0, 7, (10,), generator=generator)
    data = [(logits[i : i + 4, :, None, None], labels[i : i + 4]) for i in (0, 4, 8)]
    metrics, _ = evaluate(Scores(), data, CPU)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics["acc1"] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert metrics["acc5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def record(name):
    return json.loads((GOLDEN / "training_trajectories.json").read_text())[name]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", torch.float32),
        ("finetune_layer_decay", torch.float64),
        ("accumulation_clip_micro", torch.float32),
    ],
)
def test_recorded_trajectory_is_repeated(name, dtype):
    differences = trajectories.repeat(record(name), dtype)
    assert max(differences.values()) <= trajectories.TOLERANCE, differences


@pytest.mark.slow
def test_trajectory_check_notices_a_wrong_recipe():
    wrong = record("accumulation_clip_micro")
    wrong["config"]["clip_mode"] = "step"
    assert max(trajectories.repeat(wrong).values()) > 100 * trajectories.TOLERANCE


class TwoRows(nn.Module):
    """Two rows of logits per image, for the class in its first pixel and the next one."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        labels = x[:, 0, 0, 0].long()
        return nn.functional.one_hot(torch.stack((labels, labels + 1), dim=1).flatten(), 5).float()


def test_several_rows_per_image_have_its_label():
    images = torch.zeros(3, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0.0, 2.0, 3.0])
    batch = (images, torch.tensor([0, 2, -1]))  # the last one is unreadable
    metrics, rows = evaluate(TwoRows(), [batch], SINGLE_PROCESS, batch_size=3)
    assert rows[:, :2].tolist() == [[0, 0], [0, 1], [2, 2], [2, 3], [-1, 3], [-1, 4]]
    assert (metrics["acc1"], metrics["images"], metrics["unreadable"]) == (50, 4, 2)


def test_mean_accuracy_of_the_classes():
    rows = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1], [2, 2], [-1, 0]], dtype=torch.float64)
    rows = torch.cat((rows, torch.ones(6, 6)), dim=1)
    assert mean_class_accuracy(rows) == pytest.approx((75 + 100) / 2)


@pytest.mark.parametrize("kinds", [["flip"], ["scales"], ["crops"], ["flip", "crops", "scales"]])
def test_views_are_averaged_as_probabilities(kinds):
    torch.manual_seed(0)
    model = build_model(parse_args(SMALL).model, 4).eval()
    side = 73 if "crops" in kinds else 64
    images = torch.randn(3, 3, side, side)
    views = [images]
    if "crops" in kinds:
        views = [transforms.CenterCrop(64)(images), *(images[:, :, y : y + 64, x : x + 64]
                 for y in (0, 9) for x in (0, 9))]  # fmt: skip
    if "scales" in kinds:
        views = [
            nn.functional.interpolate(view, (s, s), mode="bicubic", antialias=True)
            for view in views
            for s in (32, 64, 96)
        ]
    if "flip" in kinds:
        views += [view.flip(3) for view in views]
    with torch.no_grad():
        expected = torch.stack([model(view).softmax(1) for view in views]).mean(0)
        found = Views(model, kinds, 64)(images)
        first = model(views[0]).softmax(1)
    torch.testing.assert_close(found.exp(), expected)
    assert not torch.allclose(expected, first, atol=1e-5)


def test_plateau_follows_rank_0(monkeypatch):
    """Where each rank evaluates by itself, accuracies may differ by rounding."""
    state, setup = small_training("--batch_size=4", "--sched=plateau", "--patience_epochs=0")
    monkeypatch.setattr("evaluation.all_gather", lambda value, _: [False, value])

    class Better:
        def of(self, *_):
            return {"acc1": 50.0, "acc5": 90.0, "loss": 1.0}, None

    evaluate_epoch(state, setup, Better(), lambda: None)
    assert state.progress.rate_factor == pytest.approx(0.1)
    setup.schedule.apply(state.optimizer, 1, state.progress.rate_factor)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_scales_that_a_model_does_not_take():
    model = Views(timm.create_model("deit_tiny_patch16_224", num_classes=3), ["scales"], 224)
    with pytest.raises(UserError, match="--tta scales: the model fails at 192 pixels: .*height"):
        model(torch.randn(1, 3, 224, 224))
