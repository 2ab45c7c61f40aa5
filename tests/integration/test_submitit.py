"""The job itself, on submitit's local executor: two processes, ranks from submitit."""

import json
import signal
import time

import psutil
import pytest
import submitit

from cli import parse_args
from run_with_submitit import Job
from tests.integration.conftest import ROOT


def test_job_trains_with_two_processes(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
def test_a_job_that_is_to_make_room_goes_on_by_itself(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
