"""Whatever stops a run, it goes on with the very next batch to the undisturbed run's result."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import main
from config.command_line import parse_args
from runtime.signals import Stopped, Watch
from tests.integration.conftest import ROOT, free_port, launch
from tests.unit.test_logging import values_in_tensorboard, values_in_wandb

# every source of random numbers; 6 steps an epoch of 72 images, in batches of 12
RANDOM = [
    *("--drop_path", "0.3", "--mixup", "0.8", "--cutmix", "1", "--aa", "rand-m9-mstd0.5-inc1"),
    *("--reprob", "0.5", "--model_ema", "true", "--model_ema_eval", "true"),
    *("--model_ema_decay", "0.9", "--log_interval", "4"),
    *("--num_workers", "1"),
]


def command(flags, processes, *more):
    launcher = [
        *("-m", "torch.distributed.run", f"--nproc_per_node={processes}"),
        f"--master_port={free_port()}",
    ]
    batch = ["--batch_size", str(12 // processes)]
    start = launcher if processes > 1 else []
    return [sys.executable, *start, "main.py", *flags, *RANDOM, *batch, *map(str, more)]


def start(arguments):
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def finish(arguments):
    process = start(arguments)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for(folder, pattern, seconds=120):
    """Until the folder holds such a file."""
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.01)


def workers(process):
    """The training processes behind a launcher, by rank."""
    found = []
    for child in psutil.Process(process.pid).children():
        if "main.py" in child.cmdline():
            found.append((int(child.environ()["RANK"]), child))
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def assert_same(left, right, last_epoch=3):
    """Weights, averages, optimizers and logs of two runs, bit for bit."""
    assert (left / "log.txt").read_text() == (right / "log.txt").read_text()
    for name in (f"checkpoint-{last_epoch}.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (left, right))
        for part in ("model", "model_ema", "optimizer", "meters"):
            torch.testing.assert_close(one[part], two[part], rtol=0, atol=0, equal_nan=True)
        assert all(one[key] == two[key] for key in ("epoch", "step", "position", "max_accuracy"))


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one process", "two processes"],
)
def undisturbed(request, tmp_path_factory, digits):
    """(processes, flags, folder of a run that nothing has stopped)"""
    flags = [
        *("--model", "hornet_atto_7x7"),
        *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
        *("--data_set", "image_folder", "--data_path", str(digits)),
        *("--input_size", "32", "--device", "cpu", "--epochs", "4", "--warmup_epochs", "0"),
        *("--lr", "1e-3", "--layer_scale_init_value", "0.5"),
    ]
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(command(flags, request.param, "--output_dir", folder, "--num_workers", 2))
    return request.param, flags, folder


@pytest.mark.slow
def test_a_kill_inside_an_epoch(undisturbed, tmp_path):
    processes, flags, folder = undisturbed
    every = ["--output_dir", tmp_path, "--save_ckpt_steps", 1]
    process = start(command(flags, processes, *every, "--num_workers", 1))
    wait_for(tmp_path, "checkpoint-1-*.pth")
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()
    output = finish(command(flags, processes, *every, "--num_workers", 0))
    assert "resumed" in output
    assert "at epoch 1, after 0 of" not in output
    assert_same(folder, tmp_path)


@pytest.mark.slow
def test_trackers_have_one_curve_after_a_kill(undisturbed, tmp_path, monkeypatch):
    processes, flags, _ = undisturbed
    if processes > 1:
        pytest.skip("only the first process writes them")
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = ["--output_dir", tmp_path, "--save_ckpt_steps", 4, "--enable_wandb", "true"]
    more += ["--log_dir", tmp_path / "events", "--log_interval", 1]
    process = start(command(flags, processes, *more))
    wait_for(tmp_path, "checkpoint-1-*.pth")
    time.sleep(0.3)  # some steps later
    process.kill()
    process.communicate()
    finish(command(flags, processes, *more))
    steps = [step for step, _ in values_in_tensorboard(tmp_path / "events", "train/loss")]
    assert steps == list(range(1, 25))
    # a kill just after the values of an epoch were written leaves them twice, and never out
    epochs = values_in_tensorboard(tmp_path / "events", "test_acc1")
    assert sorted(dict(epochs)) == [6, 12, 18, 24]
    assert len(set(epochs)) == 4
    # a kill loses what the process of wandb has not written yet
    (points,) = values_in_wandb(tmp_path, "train/loss").values()
    assert len({step for step, _ in points}) == len(points)
    assert {step for step, _ in points} >= {22, 23, 24}
    saved = torch.load(tmp_path / "checkpoint-3.pth", weights_only=True)
    assert saved["wandb_id"] == json.loads((tmp_path / "trackers.json").read_text())["wandb_id"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_stops(undisturbed, tmp_path, number):
    processes, flags, folder = undisturbed
    if (processes > 1) != (number == signal.SIGUSR2):
        pytest.skip("each signal once; processes agree on any of them alike")
    arguments = command(flags, processes, "--output_dir", tmp_path, "--save_ckpt_steps", 1)
    process = start(arguments)
    wait_for(tmp_path, "checkpoint-0-2.pth.sha256")
    ranks = workers(process) if processes > 1 else [psutil.Process(process.pid)]
    ranks[-1].send_signal(number)  # one of them is enough
    output = process.communicate(timeout=60)[0]
    assert f"stopped by {number.name} after saving" in output, output[-2000:]
    assert processes > 1 or process.returncode == 128 + number
    saved = max(tmp_path.glob("checkpoint-0-*.pth"), key=lambda path: int(path.stem[13:]))
    assert f"resumed {saved}" in finish([*arguments, "--num_workers", "0"])
    assert_same(folder, tmp_path)


@pytest.mark.slow
def test_a_killed_rank_is_started_again(undisturbed, tmp_path):
    processes, flags, folder = undisturbed
    if processes == 1:
        pytest.skip("it takes a launcher")
    arguments = command(flags, processes, "--output_dir", tmp_path, "--save_ckpt_steps", 1)
    arguments.insert(3, "--max-restarts=2")
    process = start(arguments)
    wait_for(tmp_path, "checkpoint-0-*.pth.sha256")
    workers(process)[1].kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output[-3000:]
    assert "resumed" in output
    assert_same(folder, tmp_path)


@pytest.mark.parametrize("asked", [8, 10])
@pytest.mark.slow
def test_a_signal_in_an_evaluation(undisturbed, tmp_path, monkeypatch, asked):
    """Of 10 moments an epoch 6 come after steps, 2 with batches of the model, 2 of its average."""
    processes, flags, folder = undisturbed
    if processes == 2:
        pytest.skip("in this process")
    arguments = command(flags, 1, "--output_dir", tmp_path, "--num_workers", 0)[2:]
    moments = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(Watch, "ask", lambda _: (False, signal.SIGTERM * (next(moments) == asked)))
        with pytest.raises(Stopped):
            main.run(parse_args(arguments))
    assert list(tmp_path.glob("checkpoint-0-6.pth"))
    assert not (tmp_path / "log.txt").exists()
    assert "resumed" in finish([sys.executable, "main.py", *arguments])
    assert_same(folder, tmp_path)


@pytest.mark.slow
def test_processes_that_start_again_do_not_call_dead_ones(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        "from datetime import timedelta\n"
        "from runtime.distributed import meeting_place\n"
        "store = meeting_place('env://', 0, 1, timedelta(seconds=30))\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    store.set('address of rank 1', 'old')\n"
        "    sys.exit(1)\n"
        "sys.exit(store.check(['address of rank 1']))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--max-restarts=1", f"--master_port={free_port()}"]
    result = launch(*launcher, script, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(undisturbed, tmp_path):
    processes, flags, _ = undisturbed
    if processes == 1:
        pytest.skip("there is nobody to wait")
    more = ["--output_dir", tmp_path, "--save_ckpt_steps", 1, "--dist_timeout", 0.2]
    process = start(command(flags, processes, *more))
    wait_for(tmp_path, "checkpoint-0-2.pth.sha256")
    stopped = workers(process)[1]
    stopped.suspend()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "main.py: error: rank 1 of 2 does not answer" in output, output[-3000:]
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_other_numbers_of_processes(undisturbed, tmp_path):
    """The rest of the epoch's images are seen once by whoever goes on."""
    processes, flags, folder = undisturbed
    process = start(command(flags, processes, "--output_dir", tmp_path, "--save_ckpt_steps", 1))
    wait_for(tmp_path, "checkpoint-0-2.pth.sha256")
    (psutil.Process(process.pid) if processes == 1 else workers(process)[0]).send_signal(
        signal.SIGTERM
    )
    process.communicate(timeout=60)
    output = finish(command(flags, 3 - processes, "--output_dir", tmp_path, "--num_workers", 0))
    assert "flag changed" in output
    ours, theirs = ([json.loads(x) for x in (f / "log.txt").open()] for f in (tmp_path, folder))
    assert [r["epoch"] for r in ours] == [r["epoch"] for r in theirs]
    steps = [
        torch.load(f / "checkpoint-3.pth", weights_only=True)["step"] for f in (tmp_path, folder)
    ]
    assert steps == [24, 24]
    # drop path and mixup are drawn by each process, the images and their order are the same
    assert ours[-1]["train_loss"] == pytest.approx(theirs[-1]["train_loss"], rel=0.3)


@pytest.mark.slow
def test_a_run_whose_gradients_are_not_finite_says_where(undisturbed, tmp_path):
    processes, flags, _ = undisturbed
    if processes == 1:
        pytest.skip("with several, which have to agree")
    wild = ["--layer_scale_init_value", "1e38", "--max_bad_steps", "3", "--output_dir", tmp_path]
    output = start(command(flags, processes, *wild)).communicate(timeout=120)[0]
    assert "main.py: error: the gradient was not finite in 4 steps in a row" in output
    report = json.loads((tmp_path / "bad_step.json").read_text())
    assert report["step"] == 3
    assert len(report["images"]) == 12
    assert all((ROOT / name).is_file() for name in report["images"])
    assert "head.weight" in report["gradient_norms"]
    saved = torch.load(tmp_path / "checkpoint-start.pth", weights_only=True)["model"]
    assert all(weight.isfinite().all() for weight in saved.values())
