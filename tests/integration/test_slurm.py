"""Jobs on a real Slurm of two nodes: whatever ends them, they come to the undisturbed result."""

import re
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import launch
from tests.integration.slurm import Cluster, why_not
from tests.integration.test_survive import RANDOM, assert_same, wait_for

pytestmark = pytest.mark.slow
LAST_EPOCH = 19


@pytest.fixture(scope="module")
def cluster():
    if why_not():
        pytest.skip(why_not())
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to Slurm's daemons
        Path(folder).chmod(0o755)
        started = Cluster(Path(folder))
        yield started
        started.stop()


@pytest.fixture(scope="module")
def submit(cluster, digits):
    """Submits a training on both nodes that saves inside epochs; the number of its job."""

    def call(folder, *more):
        flags = [
            *("--nodes", "2", "--ngpus", "0", "--cpus_per_task", "1", "--mem_gb", "1"),
            *("--job_dir", folder / "jobs", "--output_dir", folder / "run"),
            *("--model", "hornet_atto_7x7"),
            *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
            *("--data_set", "image_folder", "--data_path", digits, "--input_size", "32"),
            *("--epochs", LAST_EPOCH + 1, "--warmup_epochs", "0", "--lr", "1e-3"),
            *("--layer_scale_init_value", "0.5", "--device", "cpu", "--batch_size", "6"),
            *("--save_ckpt_steps", "3", *RANDOM),
        ]
        configuration = cluster.environment["SLURM_CONF"]
        result = launch("run_with_submitit.py", *flags, *more, SLURM_CONF=configuration)
        assert result.stdout.startswith("submitted job "), result.stderr
        return result.stdout.split()[2].rstrip(";")

    return call


@pytest.fixture(scope="module")
def undisturbed(submit, cluster, tmp_path_factory):
    """The folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    number = submit(folder)
    assert cluster.wait_for(number, "COMPLETED")["Restarts"] == "0"
    assert "2 process(es)" in output(folder, number)
    return folder / "run"


def output(folder, number):
    """What the first rank of a job has written."""
    return "".join(path.read_text() for path in folder.glob(f"jobs/{number}_0_log.*"))


def rank_of(number, rank):
    """The training process of that rank of a job."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if "submitit.core._submit" not in process.cmdline():
                continue
        except psutil.Error:
            continue
        found = (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID"))
        if found == (number, str(rank)):
            return process
    raise AssertionError(f"job {number} has no rank {rank}")


def make_room(cluster, number, folder):
    """Waits until the job has made room for one of higher priority, gone on and come to its end."""
    wait_for(folder / "run", "checkpoint-2.pth")
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    cluster.run("sbatch", *urgent, "--wrap=sleep 2")
    cluster.wait_for(number, "PENDING")
    assert cluster.wait_for(number, "COMPLETED")["Restarts"] == "1"
    assert re.search(r"resumed \S+checkpoint-\d+-\d+.pth", output(folder, number))


def test_a_job_of_higher_priority(submit, cluster, undisturbed, tmp_path):
    number = submit(tmp_path, "--save_ckpt_steps", "0")
    make_room(cluster, number, tmp_path)
    assert "this job is preempted" in output(tmp_path, number)
    assert_same(undisturbed, tmp_path / "run", LAST_EPOCH)


def test_a_job_of_higher_priority_where_slurm_sends_sigterm(submit, cluster, undisturbed, tmp_path):
    notice = "SlurmctldParameters=preempt_send_user_signal"
    cluster.reconfigure(notice, f"#{notice}")
    try:
        number = submit(tmp_path, "--save_ckpt_steps", "0")
        make_room(cluster, number, tmp_path)
    finally:
        cluster.reconfigure(f"#{notice}", notice)
    assert "this job is preempted" not in output(tmp_path, number)
    assert_same(undisturbed, tmp_path / "run", LAST_EPOCH)


def test_a_requeue_without_notice(submit, cluster, undisturbed, tmp_path):
    number = submit(tmp_path)
    wait_for(tmp_path / "run", "checkpoint-2-*.pth")
    cluster.run("scontrol", "requeue", number)
    assert cluster.wait_for(number, "COMPLETED")["Restarts"] == "1"
    assert_same(undisturbed, tmp_path / "run", LAST_EPOCH)


def test_a_killed_rank(submit, cluster, undisturbed, tmp_path):
    number = submit(tmp_path)
    wait_for(tmp_path / "run", "checkpoint-2-*.pth")
    rank_of(number, 1).kill()
    cluster.wait_for(number, "FAILED", seconds=30)
    cluster.wait_for(submit(tmp_path), "COMPLETED")
    assert_same(undisturbed, tmp_path / "run", LAST_EPOCH)


def test_the_time_limit(submit, cluster, undisturbed, tmp_path):
    two_minutes = ["--timeout", "0.033", "--signal_delay_s", "30"]  # the signal after 60 to 90 s
    number = submit(tmp_path, "--save_ckpt_steps", "0", *two_minutes)
    wait_for(tmp_path / "run", "checkpoint-2.pth")
    for rank in (0, 1):  # so that the job does not end before; Slurm sends SIGCONT with its signal
        rank_of(number, rank).suspend()
    cluster.wait_for(number, "PENDING")
    assert int(cluster.wait_for(number, "COMPLETED")["Restarts"]) > 0
    assert "this job is timed-out" in output(tmp_path, number)
    assert_same(undisturbed, tmp_path / "run", LAST_EPOCH)


def test_a_cancelled_job(submit, cluster, undisturbed, tmp_path):
    number = submit(tmp_path)
    wait_for(tmp_path / "run", "checkpoint-2-*.pth")
    cluster.run("scancel", number)
    cluster.wait_for(number, "CANCELLED")
    cluster.wait_for(submit(tmp_path), "COMPLETED")
    assert_same(undisturbed, tmp_path / "run", LAST_EPOCH)


def test_a_partition_that_does_not_exist(submit, tmp_path):
    with pytest.raises(AssertionError, match=r"run_with_submitit.py: error: .*partition"):
        submit(tmp_path, "--partition", "nowhere")
