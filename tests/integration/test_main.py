"""main.py from end to end: training, log, checkpoints, resume, evaluation, processes, mistakes."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import PosixPath

import pytest
import torch

import main
from checkpoints.reading import read_checkpoint
from checkpoints.run_folder import RunFolder, save_checkpoint
from config.command_line import parse_args
from input_pipeline.image_sets import ListedImages
from input_pipeline.loaders import TrainImages
from runtime import distributed
from runtime.errors import UserError, exit_on_user_error
from runtime.logging import read_log
from tests.integration.conftest import ROOT, free_port, launch

EVERYTHING = [
    *("--model_ema", "true", "--model_ema_decay", "0.8", "--model_ema_eval", "true"),
    *("--drop_path", "0.2", "--clip_grad", "1", "--layer_decay", "0.8", "--update_freq", "2"),
]
MUON = (
    '--opt muon --opt_args {"ns_steps":3} --sched plateau --patience_epochs 0 --aug_repeats 3 '
    "--class_balanced true --class_weights balanced --loss bce --num_workers 2"
)
LAMB = (
    "--opt lamb --sched wsd --decay_epochs 1 --cooldown_epochs 1 --loss focal --eval_freq 2 "
    "--layer_decay_min 0.7 --model_ema_warmup true --model_ema_more 0.5 0.99 "
    "--size_schedule 32@0 64@1 32@2"
)


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def train(flags, folder, *more):
    main.run(parse_args([*flags, "--output_dir", str(folder), *more]))
    return records(folder)


def assert_same(left, right):
    for name in (name for name in left if name.startswith("model")):
        for key, weight in (left[name] or {}).items():
            assert torch.equal(weight, right[name][key]), f"{name} {key}"
    left, right = left["optimizer"], right["optimizer"]
    assert left["param_groups"] == right["param_groups"]
    torch.testing.assert_close(left["state"], right["state"], rtol=0, atol=0)


def test_run_leaves_the_published_files(flags, tmp_path):
    log = train(flags, tmp_path, *EVERYTHING, "--log_dir", str(tmp_path / "events"))
    assert [r["epoch"] for r in log] == [0, 1]
    assert log[-1].keys() == {
        *("train_loss", "train_lr", "train_min_lr", "train_weight_decay", "train_grad_norm"),
        *("test_loss", "test_acc1", "test_acc5", "max_accuracy"),
        *("test_loss_ema", "test_acc1_ema", "test_acc5_ema", "max_ema_accuracy"),
        *("epoch", "n_parameters", "GFLOPs"),
    }
    files = {path.name for path in tmp_path.iterdir()}
    checkpoints = {name for name in files if name.endswith(".pth")}
    assert {f"{name}.sha256" for name in checkpoints} <= files
    names = {name for name in files if not name.endswith(".sha256")} - {"checkpoint-best-ema.pth"}
    names.discard(".lock")
    timing = read_log(tmp_path, "timing.txt")
    assert [record["epoch"] for record in timing] == [0, 1]
    for record in timing:  # 4 steps of 8 images; the evaluation takes time, too
        assert record["train_images_per_s"] * record["seconds"] > 1.05 * 32
    assert names == {
        *("config.yaml", "log.txt", "timing.txt", "curves.png", "events", "trackers.json"),
        *("checkpoint-start.pth", "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth"),
    }
    assert list((tmp_path / "events").iterdir())
    state = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args", "model_ema"} <= state.keys()
    assert (state["epoch"], state["step"], state["classes"]) == (1, 8, ["0", "3", "7"])
    config = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert state["args"] == config.flat()
    start = torch.load(tmp_path / "checkpoint-start.pth", weights_only=True)
    assert (start["epoch"], start["step"]) == (-1, 0)


@pytest.mark.parametrize(
    "case",
    [
        ["--num_workers", "2"],
        ["--use_amp", "true"],
        *(
            pytest.param(flags.split(), marks=pytest.mark.slow)
            for flags in (
                "--use_amp true --amp_dtype float16",
                "--grad_checkpointing true",
                "--channels_last false --model hornet_atto_gf",
            )
        ),
        MUON.split(),
        LAMB.split(),
        pytest.param(
            ["--compile", "true", "--use_amp", "true", "--model", "hornet_atto_gf"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda case: "-".join(word.removeprefix("--") for word in case),
)
def test_resumed_run_equals_an_undisturbed_one(flags, tmp_path, capsys, case):
    more = [*EVERYTHING, "--epochs", "3", *case]
    whole = train(flags, tmp_path / "whole", *more)
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    (stopped / "checkpoint-2.pth").unlink()
    (stopped / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in whole[:2]))
    capsys.readouterr()
    resumed = train(flags, stopped, *more)
    assert "checkpoint-1.pth at epoch 2" in capsys.readouterr().out
    assert resumed == whole
    assert_same(
        read_checkpoint(tmp_path / "whole/checkpoint-2.pth"),
        read_checkpoint(stopped / "checkpoint-2.pth"),
    )


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        (["--grad_checkpointing", "true"], 0),
        (["--channels_last", "false"], 1e-3),
        pytest.param(["--compile", "true"], 1e-3, marks=pytest.mark.slow),
    ],
    ids=lambda case: case[0][2:] if isinstance(case, list) else "",
)
@pytest.mark.slow
def test_ways_to_compute_that_change_no_result(flags, tmp_path, case, tolerance):
    for model in ("hornet_atto_7x7", "hornet_atto_gf"):
        plain = train([*flags, "--model", model], tmp_path / f"{model}-plain", *EVERYTHING)
        other = train([*flags, "--model", model], tmp_path / f"{model}-other", *EVERYTHING, *case)
        for left, right in zip(plain, other, strict=True):
            assert left == (pytest.approx(right, rel=tolerance) if tolerance else right)


def test_resume_keeps_best_accuracies_and_average(flags, tmp_path):
    train(flags, tmp_path, *EVERYTHING)
    (tmp_path / "checkpoint-1.pth").unlink()
    state = read_checkpoint(tmp_path / "checkpoint-0.pth")
    state |= {"max_accuracy": 101.0, "max_ema_accuracy": 102.0}
    state["model_ema"] = {k: torch.zeros_like(v) for k, v in state["model_ema"].items()}
    save_checkpoint(state, tmp_path / "checkpoint-0.pth")
    before = (tmp_path / "checkpoint-best.pth").read_bytes()
    log = train(flags, tmp_path, *EVERYTHING)
    assert (log[-1]["max_accuracy"], log[-1]["max_ema_accuracy"]) == (101.0, 102.0)
    assert (tmp_path / "checkpoint-best.pth").read_bytes() == before
    # an average that started at 0 is a sum of weights with the factors 0.2 x 0.8 ** i
    last = read_checkpoint(tmp_path / "checkpoint-1.pth")
    share = 1 - 0.8**4  # 4 steps an epoch
    gamma, average = (last[name]["stages.0.0.gamma1"].mean() for name in ("model", "model_ema"))
    assert average / gamma == pytest.approx(share, rel=1e-2)


def as_released(state, **changes):
    """A checkpoint of this project as the original release wrote them."""
    for group in state["optimizer"]["param_groups"]:
        for name in group.keys() - {"params", "lr", "betas", "eps", "weight_decay", "lr_scale"}:
            del group[name]
    kept = {name: state[name] for name in ("model", "model_ema", "optimizer", "epoch")}
    flags = argparse.Namespace(model="hornet_atto_7x7", output_dir=PosixPath("logs"))
    return kept | {"scaler": {}, "args": flags} | changes


def test_released_checkpoint_is_resumed(flags, tmp_path, capsys):
    """Without step and best accuracy, with a pickled Namespace, and older optimizer settings."""
    whole = train(flags, tmp_path / "whole", *EVERYTHING)
    folder = tmp_path / "released"
    folder.mkdir()
    state = read_checkpoint(tmp_path / "whole/checkpoint-0.pth")
    torch.save(as_released(state), folder / "checkpoint-0.pth")
    best = {"max_accuracy": 101.0, "max_ema_accuracy": 102.0}
    records = [whole[0] | best, whole[1] | {"max_accuracy": 103.0}]
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    log = train(flags, folder, *EVERYTHING)
    assert log[-1] == whole[-1] | best
    assert "had other steps" not in capsys.readouterr().out
    assert_same(
        read_checkpoint(tmp_path / "whole/checkpoint-1.pth"),
        read_checkpoint(folder / "checkpoint-1.pth"),
    )


@pytest.mark.slow
def test_released_checkpoint_with_a_word_for_its_epoch(flags, tmp_path, monkeypatch):
    train(flags, tmp_path / "whole", "--epochs", "1")
    state = read_checkpoint(tmp_path / "whole/checkpoint-start.pth")
    path = tmp_path / "checkpoint-start.pth"
    torch.save(as_released(state, epoch="start"), path)
    log = train(flags, tmp_path / "started", "--epochs", "1", "--resume", str(path))
    assert [record["epoch"] for record in log] == [0]
    torch.save(as_released(state, epoch="best"), path)
    message = fail(monkeypatch, *flags, "--resume", path)
    assert "its epoch is 'best', not a number (see --start_epoch)" in message
    log = train(flags, tmp_path / "best", "--resume", str(path), "--start_epoch", "1")
    assert [record["epoch"] for record in log] == [1]


def test_evaluation_prints_the_accuracy_of_the_log(flags, tmp_path, capsys):
    log = train(flags, tmp_path, *EVERYTHING)
    path = str(tmp_path / "checkpoint-1.pth")
    capsys.readouterr()
    main.run(parse_args([*flags, *EVERYTHING, "--eval", "true", "--resume", path]))
    out = capsys.readouterr().out
    for title, suffix in (("test", ""), ("test EMA", "_ema")):
        found = re.search(rf"{title} on 33 images: top-1 (\S+)%  top-5 (\S+)%  loss (\S+)", out)
        expected = [log[-1][f"test_{name}{suffix}"] for name in ("acc1", "acc5", "loss")]
        assert [float(value) for value in found.groups()] == pytest.approx(expected, abs=0.006)


def test_deterministic_algorithms_come_first(flags, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(main, "use_deterministic_algorithms", lambda: calls.append("algorithms"))
    before = main.distributed.init_distributed

    def start(*arguments, **options):
        calls.append("processes")
        return before(*arguments, **options)

    monkeypatch.setattr(main.distributed, "init_distributed", start)
    short = ["--epochs", "1", "--max_images", "16", "--output_dir", str(tmp_path)]
    main.run(parse_args([*flags, *short]))
    main.run(parse_args([*flags, *short, "--deterministic", "true"]))
    assert calls == ["processes", "algorithms", "processes"]


def test_labels_of_a_checkpoint_in_another_order(flags, tmp_path, capsys, digits):
    """As of tar files, where 10 comes after 9; a class without a folder is not predicted."""
    log = train(flags, tmp_path, "--epochs", "1")
    state = read_checkpoint(tmp_path / "checkpoint-0.pth")
    order = torch.tensor([2, 0, 1])
    for name in ("head.weight", "head.bias"):
        state["model"][name] = state["model"][name][order]
    state["classes"] = ["7", "0", "3"]
    path = tmp_path / "other.pth"
    save_checkpoint(state, path)
    evaluation = [*flags, "--eval", "true", "--resume", str(path), "--output_dir"]
    main.run(parse_args([*evaluation, str(tmp_path / "evaluated")]))
    assert f"test on 33 images: top-1 {log[0]['test_acc1']:.2f}%" in capsys.readouterr().out
    rows = (tmp_path / "evaluated/predictions.csv").read_text().splitlines()[1:]
    assert all(f"/{row.split(',')[1]}/" in row for row in rows)
    shutil.copytree(digits / "val", tmp_path / "rest/val")
    shutil.rmtree(tmp_path / "rest/val/0")
    (tmp_path / "rest/val/0").mkdir()
    main.run(parse_args([*evaluation, "", "--data_path", str(tmp_path / "rest")]))
    out = capsys.readouterr().out
    assert "no evaluation images of 1 of the 3 classes: 0" in out
    right = sum("/0/" not in row and row.split(",")[1] == row.split(",")[2] for row in rows)
    assert f"test on 22 images: top-1 {100 * right / 22:.2f}%" in out
    (tmp_path / "rest/val/0").rmdir()
    main.run(parse_args([*evaluation, "", "--data_path", str(tmp_path / "rest")]))
    assert "evaluating over the 2 of the checkpoint's 3 classes" in capsys.readouterr().out


def test_checkpoint_of_other_classes_is_not_evaluated(flags, tmp_path, monkeypatch, digits):
    train(flags, tmp_path, "--epochs", "1")
    shutil.copytree(digits / "val", tmp_path / "val" / "val")
    (tmp_path / "val/val/0").rename(tmp_path / "val/val/zero")
    evaluation = ["--data_path", tmp_path / "val", "--eval", "true"]
    path = tmp_path / "checkpoint-0.pth"
    message = fail(monkeypatch, *flags, *evaluation, "--resume", path)
    assert "has 3 classes (0, 3, 7), the data 3 (3, 7, zero), of which zero are not" in message
    state = read_checkpoint(path)
    del state["classes"]
    shutil.copytree(tmp_path / "val/val/3", tmp_path / "val/val/4")
    save_checkpoint(state, path)
    message = fail(monkeypatch, *flags, *evaluation, "--resume", path)
    assert "has 3 classes, the data 4" in message


@pytest.mark.slow
def test_evaluation_with_fewer_images_than_processes(flags, tmp_path):
    train(flags, tmp_path, "--epochs", "1")
    done = launch(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "main.py", *flags),
        *("--eval", "true", "--resume", tmp_path / "checkpoint-0.pth", "--max_images", "2"),
        *("--output_dir", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "test on 2 images" in done.stdout
    assert len((tmp_path / "out/predictions.csv").read_text().splitlines()) == 3


def test_each_epoch_has_its_own_order_and_random_numbers(flags, tmp_path, monkeypatch):
    seen = []

    def epoch(state, setup, batches, *_):
        labels = torch.cat([labels for _, labels in batches])
        seen.append((tuple(labels.tolist()), torch.rand(()).item()))
        return {}

    monkeypatch.setattr(main, "train_one_epoch", epoch)
    main.run(parse_args([*flags, "--disable_eval", "true"]))
    assert len({order for order, _ in seen}) == len({number for _, number in seen}) == 2


def test_nothing_is_evaluated_or_saved_where_flags_say_so(flags, tmp_path):
    log = train(flags, tmp_path, "--disable_eval", "true", "--save_ckpt", "false")
    assert not any(name.startswith(("test", "max")) for name in log[-1])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "config.yaml", "log.txt", "timing.txt", "curves.png"}


def test_a_checkpoint_is_written_once_a_step(flags, tmp_path, monkeypatch):
    """Not again before each batch of the evaluation."""
    saved = []
    monkeypatch.setattr(RunFolder, "save_step", lambda *args: saved.append(args[2:]))
    train(flags, tmp_path, "--save_ckpt_steps", "3")
    assert saved == [(0, 3), (0, 6), (0, 9), (1, 12), (1, 15), (1, 18)]


WILD = ["--save_ckpt_steps", "1", "--log_interval", "100", "--lr", "1e30", "--epochs", "1"]


def test_checkpoints_of_bad_steps_do_not_push_out_the_one_before(flags, tmp_path, monkeypatch):
    message = fail(monkeypatch, *flags, *WILD, "--max_bad_steps", 3, "--output_dir", tmp_path)
    assert "not finite in 8 steps in a row, the last of them step 8" in message
    assert [path.name for path in tmp_path.glob("checkpoint-0-*.pth")] == ["checkpoint-0-1.pth"]


def test_a_network_that_has_lost_its_way_is_not_the_best(flags, tmp_path):
    log = train(flags, tmp_path, *WILD)
    assert log[-1]["test_loss"] is None
    assert not list(tmp_path.glob("checkpoint-best*"))


def test_an_error_of_this_process_is_not_one_of_another(flags, monkeypatch):
    def fails(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(main, "train", fails)
    monkeypatch.setattr(distributed, "absent_ranks", lambda _: [1])
    with pytest.raises(RuntimeError, match="shapes cannot"):
        main.run(parse_args(flags))


def test_a_loader_process_that_is_killed(flags, monkeypatch):
    monkeypatch.setattr(TrainImages, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(ListedImages, "needs_fork", True)  # others would not see the line above
    message = fail(monkeypatch, *flags, "--num_workers", "1")
    assert message.startswith("main.py: error: a loader worker was killed, perhaps")


def test_finished_run_only_says_so(flags, tmp_path, capsys):
    train(flags, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    train(flags, tmp_path, "--lr", "5e-4")
    assert "nothing to train: epoch 1 of --epochs 2 is done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_names_the_flags_that_changed(flags, tmp_path, capsys):
    train(flags, tmp_path)
    capsys.readouterr()
    train(flags, tmp_path, "--lr", "5e-4", "--epochs", "3")
    out = capsys.readouterr().out
    assert "checkpoint-1.pth: lr 0.001 -> 0.0005" in out
    assert "checkpoint-1.pth: epochs 2 -> 3" in out
    assert out.count("flag changed") == 2


def test_a_model_learns_from_a_run_and_resumes(flags, tmp_path, capsys):
    teacher = tmp_path / "teacher/checkpoint-best.pth"
    train(flags, teacher.parent, "--epochs", "1")
    more = ["--teacher", str(teacher), "--distill", "features", *EVERYTHING]
    whole = train(flags, tmp_path / "run", *more)
    (tmp_path / "run/checkpoint-1.pth").rename(tmp_path / "last.pth")
    (tmp_path / "run/log.txt").write_text(json.dumps(whole[0]) + "\n")
    assert train(flags, tmp_path / "run", *more) == whole
    left, right = map(read_checkpoint, (tmp_path / "last.pth", tmp_path / "run/checkpoint-1.pth"))
    assert_same(left, right)
    torch.testing.assert_close(left["projection"], right["projection"], rtol=0, atol=0)
    assert "teacher" not in str([*left["model"]])
    main.run(parse_args([*flags, "--eval", "true", "--resume", str(tmp_path / "last.pth")]))
    assert f"top-1 {whole[-1]['test_acc1']:.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [
        ["--clip_mode", "step"],
        pytest.param(["--clip_mode", "micro"], marks=pytest.mark.slow),
        pytest.param(["--distill", "features", "--opt_eps", "1e-4"], marks=pytest.mark.slow),
    ],
    ids=lambda case: case[1],
)
def test_two_processes_equal_one_with_twice_the_batch(flags, tmp_path, case):
    if case[0] == "--distill":
        train(flags, tmp_path / "teacher", "--epochs", "1")
        case = [*case, "--teacher", str(tmp_path / "teacher/checkpoint-best.pth")]
    plain = [
        *("--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0", "--aa", "none"),
        *("--color_jitter", "0", "--reprob", "0", "--mixup", "0", "--cutmix", "0"),
        *("--update_freq", "2", "--clip_grad", "1", "--epochs", "2", *case),
    ]
    one = train(flags, tmp_path / "one", *plain, "--batch_size", "8")
    done = launch(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"),
        *(*flags, *plain, "--batch_size", "4", "--output_dir", tmp_path / "two"),
    )
    assert done.returncode == 0, done.stderr
    timing = read_log(tmp_path / "two", "timing.txt")
    assert [(r["epoch"], r["processes"]) for r in timing] == [(0, 2), (1, 2)]
    for left, right in zip(one, records(tmp_path / "two"), strict=True):
        for name in left:
            assert left[name] == pytest.approx(right[name], rel=2e-4), name
    left, right = (
        read_checkpoint(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("one", "two")
    )
    for name, weight in left.items():
        # AdamW turns rounding of gradients near 0 into steps of up to lr = 1e-3
        assert (weight - right[name]).norm() <= 1e-3 * weight.norm() + 1e-4, name


@pytest.mark.slow
def test_one_process_with_a_group_of_its_own(flags, tmp_path):
    alone = train(flags, tmp_path / "alone", *EVERYTHING)
    done = launch(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "main.py"),
        *(*flags, *EVERYTHING, "--output_dir", tmp_path / "group"),
    )
    assert done.returncode == 0, done.stderr
    for left, right in zip(alone, records(tmp_path / "group"), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.slow
def test_torch_distributed_launch(flags, tmp_path):
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node=2"]
    done = launch(
        *(*launcher, f"--master_port={free_port()}", "main.py"),
        *(*flags, "--epochs", "1", "--batch_size", "16", "--output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    # 33 images on two processes: each counted once
    share = records(tmp_path)[0]["test_acc1"] * 33 / 100
    assert share == pytest.approx(round(share), abs=1e-6)


@pytest.mark.slow
def test_srun_with_a_file_to_meet_at(flags, tmp_path):
    """Two processes that know only their SLURM_PROCID."""
    more = ["--epochs", "1", "--world_size", "2", "--dist_url", f"file://{tmp_path / 'meet'}"]
    command = [sys.executable, "main.py", *flags, *more, "--output_dir", str(tmp_path / "run")]
    processes = []
    for rank in "01":
        ranks = {"SLURM_PROCID": rank}
        environment = {k: v for k, v in os.environ.items() if "RANK" not in k} | ranks
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(records(tmp_path / "run")) == 1


@pytest.mark.parametrize("value", ["2", "7"])
def test_local_rank_flag_is_understood(value):
    assert parse_args([f"--local-rank={value}"]).processes.local_rank == int(value)


def fail(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
    with pytest.raises(SystemExit) as caught, exit_on_user_error("main.py"):
        main.main(parse_args())
    message = str(caught.value.code)
    assert message.startswith("main.py: error: ")
    assert "\n" not in message
    return message


def test_mistakes_end_in_one_line(flags, tmp_path, monkeypatch):
    assert "there is no flag modell" in fail(monkeypatch, "--modell", "x")
    assert "data_path" in fail(monkeypatch, *flags, "--data_path", tmp_path / "none")
    wrong = ["--model", "hornet_tinny_7x7", "--data_path", tmp_path / "none"]
    message = fail(monkeypatch, *flags, *wrong)  # before the data, which may take long to list
    assert "near names: hornet_tiny_7x7" in message
    assert "cannot be built" in fail(monkeypatch, *flags, "--model_kwargs", '{"width": 3}')
    message = fail(monkeypatch, *flags, "--input_size", "16")
    assert "--input_size 16: hornet_atto_7x7 fails: images of 16 x 16 are too small" in message
    assert "does not exist" in fail(monkeypatch, *flags, "--eval", "1", "--resume", "none.pth")
    assert "lower --batch_size" in fail(monkeypatch, *flags, "--batch_size", "100")
    assert "--device" in fail(monkeypatch, *flags, "--device", "abacus")
    (tmp_path / "empty").mkdir()
    message = fail(monkeypatch, *flags, "--data_path", tmp_path / "empty", "--disable_eval", "1")
    assert "empty needs one folder of images per class" in message


def test_damaged_and_foreign_checkpoints(flags, tmp_path, monkeypatch):
    train(flags, tmp_path, "--epochs", "1")
    path = tmp_path / "checkpoint-0.pth"
    whole = path.read_bytes()
    message = fail(monkeypatch, *flags, "--model_kwargs", "{}", "--resume", path)
    assert "is of another model" in message
    for other in (["--layer_decay", "0.5"], ["--opt", "sgd"]):
        message = fail(monkeypatch, *flags, *other, "--resume", path)
        assert "has another optimizer" in message
    state = read_checkpoint(path)
    save_checkpoint(state | {"classes": ["a", "b"]}, tmp_path / "other.pth")
    message = fail(monkeypatch, *flags, "--resume", tmp_path / "other.pth")
    assert "has 2 classes (a, b), the data 3 (0, 3, 7)" in message
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in fail(monkeypatch, *flags, "--resume", path)
    save_checkpoint({"model": state["model"]}, path)
    assert "cannot be resumed" in fail(monkeypatch, *flags, "--resume", path)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_is_named(flags, digits, tmp_path, monkeypatch, workers):
    shutil.copytree(digits, tmp_path / "data")
    broken = next((tmp_path / "data/train/3").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    data = ["--data_path", tmp_path / "data", "--num_workers", workers]
    output = ["--output_dir", tmp_path / "run"]
    message = fail(monkeypatch, *flags, *data, *output, "--max_bad_images", "0")
    assert "1 images cannot be read, more than --max_bad_images 0" in message
    assert str(broken) in message


def test_broken_images_are_listed(flags, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    broken = [next((tmp_path / f"data/{part}/3").iterdir()) for part in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    log = train([*flags, "--data_path", str(tmp_path / "data")], tmp_path / "run")
    assert len(log) == 2
    assert abs(log[-1]["test_acc1"] * 32 / 100 % 1) < 1e-6  # one of the 33 does not count
    lines = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(map(str, broken))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["--data_path", "none"], "--data_path none is not a folder"),
        (["--data_set", "hfds/a/b", "--data_path", "none"], "--data_path none is not a folder"),
        (["--model", "hornet_tinny_gf"], "there is no model hornet_tinny_gf; near names: "),
        (["--data_set", "imagefolder"], "--data_set imagefolder: choose one of IMNET"),
    ],
)
@pytest.mark.parametrize("weights", [["--eval", "true", "--resume"], ["--finetune"]])
def test_wrong_flags_are_told_before_a_download(flags, monkeypatch, weights, wrong, line):
    monkeypatch.setattr(main.sources, "local_file", lambda *_: pytest.fail("downloads"))
    with pytest.raises(UserError, match=line):
        main.run(parse_args([*flags, *weights, "https://none/a.pth", "--model", "auto", *wrong]))


@pytest.mark.slow
def test_as_a_user_types_it(flags, tmp_path):
    done = launch("main.py", *flags, "--data_path", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr == f"main.py: error: --data_path {tmp_path / 'none'} is not a folder\n"
    done = launch("main.py", "--help")
    assert done.returncode == 0
    assert "--layer_decay" in done.stdout


@pytest.mark.parametrize(("flag", "status"), [("--help", "0"), ("--modell", "main.py: error")])
def test_help_and_wrong_flags_do_not_wait_for_torch(flag, status):
    code = (
        "import runpy, sys\nsys.argv = ['main.py', sys.argv[1]]\n"
        "try: runpy.run_path('main.py', run_name='__main__')\n"
        "except SystemExit as ended: print('ended', ended.code, 'torch' in sys.modules)"
    )
    done = launch("-c", code, flag)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"ended {status}")
    assert last.endswith(" False")
