"""The job itself, on submitit's local executor: two processes, ranks from submitit."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import submitit

import run_with_submitit
from config.command_line import parse_args
from run_with_submitit import Job
from tests.integration.conftest import ROOT


@pytest.mark.slow
def test_job_trains_with_two_processes(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    config = parse_args([*flags, "--epochs", "1", "--output_dir", str(tmp_path / "run-%j")])
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(tasks_per_node=2, nodes=1, timeout_min=5)
    job = executor.submit(Job(config))
    job.results()
    folder = tmp_path / f"run-{job.job_id}"
    assert json.loads((folder / "log.txt").read_text())["epoch"] == 0
    assert "2 process(es)" in job.stdout()
    assert (folder / "checkpoint-0.pth").is_file()


@pytest.mark.slow
def test_a_job_of_this_machine_submitted_from_elsewhere(flags, tmp_path):
    job = ["--cluster", "local", "--ngpus", "0", "--job_dir", "jobs/%j", "--epochs", "1"]
    result = subprocess.run(
        [sys.executable, ROOT / "run_with_submitit.py", *flags, *job],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.fullmatch(r"submitted job (\d+); logs in .*/jobs/\1\n", result.stdout), result.stderr
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("jobs/*/checkpoint-0.pth")):
        assert time.monotonic() < deadline, list(tmp_path.glob("jobs/*/*"))
        time.sleep(0.1)


def submit(monkeypatch, *flags):
    """The command on a machine without Slurm."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.argv", ["run_with_submitit.py", *flags])
    run_with_submitit.main()


def test_the_script_of_a_job(monkeypatch, capsys):
    who = ["--account", "vision", "--qos", "high", "--constraint", "h200", "--mem_gb", "100.5"]
    more = ["--nodes", "4", "--ngpus", "2", "--cpus_per_task", "6", "--timeout", "1.5"]
    other = ["--sbatch", '{"reservation": "night"}', "--partition", "a100", "--comment", "it's us"]
    submit(monkeypatch, *who, *more, *other, "--lr", "0.1", "--dry_run", "true")
    lines = capsys.readouterr().out.splitlines()
    wanted = {
        *("account=vision", "qos=high", "constraint=h200", "mem=102912MB", "nodes=4"),
        *("gpus-per-node=2", "ntasks-per-node=2", "cpus-per-task=6", "time=90"),
        *("reservation=night", "partition=a100", "signal=USR2@120", "job-name=hornet"),
    }
    assert wanted <= {line.removeprefix("#SBATCH --") for line in lines}
    assert "#   lr: 0.1" in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ngpus", "-1"], "--ngpus -1: has to be at least 0"),
        (["--timeout", "0"], "--timeout 0.0: has to be above 0"),
        (["--timeout", "0.03"], "--timeout 0.03 hours are not longer than --signal_delay_s 120"),
        (["--cluster", "local", "--nodes", "2"], "--nodes 2: --cluster local is a single machine"),
        (["--cluster", "pbs"], "--cluster pbs: expected"),
        (["--cluster", "local", "--job_dir", "/proc/none"], "/proc/none"),
        ([], "this machine has no sbatch"),
    ],
)
def test_jobs_that_cannot_be(monkeypatch, flags, message):
    with pytest.raises(SystemExit) as caught:
        submit(monkeypatch, *flags)
    assert str(caught.value.code).startswith("run_with_submitit.py: error: ")
    assert message in caught.value.code
    assert "\n" not in caught.value.code


@pytest.mark.slow
def test_a_job_that_is_to_make_room_goes_on_by_itself(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    every = ["--epochs", "40", "--save_ckpt_steps", "1", "--log_interval", "1"]
    config = parse_args([*flags, *every, "--output_dir", str(tmp_path / "run")])
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(tasks_per_node=1, nodes=1, timeout_min=60)
    job = executor.submit(Job(config))
    while not list(tmp_path.glob("run/checkpoint-1-*.pth")):
        time.sleep(0.02)
        assert not job.done(), job.stderr()
    (task,) = psutil.Process(int(job.job_id)).children()  # the local executor passes nothing on
    task.send_signal(signal.SIGUSR2)
    job.results()
    assert "this job is preempted" in job.stderr()
    assert "stopped by" not in job.stderr()
    assert "resumed" in job.stdout()
    records = [json.loads(line) for line in (tmp_path / "run/log.txt").open()]
    assert [record["epoch"] for record in records] == list(range(40))


def test_requeued_job_is_the_same_one(flags):
    job = Job(parse_args(flags))
    assert job.checkpoint().function is job
