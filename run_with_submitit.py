"""Submits main.py as a job on Slurm: its own few flags, and all of main.py's.

python run_with_submitit.py --nodes 4 --ngpus 8 --config recipes/imagenet1k/hornet_tiny_7x7.yaml \
    --data_path /path/to/imagenet-1k --job_dir ./logs/hornet_tiny_7x7
"""

import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
import yaml

from cli import parse_args_with
from config import Config
from runtime.errors import UserError


@dataclass(frozen=True)
class SlurmConfig:
    """Slurm"""

    ngpus: int = 8
    """GPUs a node; one process each."""
    nodes: int = 2
    """Nodes."""
    timeout: int = 72
    """Time limit in hours; a job that reaches it is requeued and continues."""
    job_name: str = "hornet"
    """Name of the job."""
    job_dir: str = ""
    """Folder of the job's logs, and output_dir where that is not given; %j stands for the job's
    number. logs/%j if not given."""
    partition: str = ""
    """Partition; the cluster's default if not given."""
    use_volta32: bool = False
    """Ask for GPUs of the constraint volta32gb."""
    comment: str = ""
    """Comment of the job."""
    dry_run: bool = False
    """Print the job instead of submitting it."""


class Job:
    """What every task of the job runs; submitit pickles it, and again when it is requeued."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self) -> None:
        # imported in the job: submitting needs neither torch nor a GPU
        from main import run
        from runtime.interrupts import Stopped

        # each process picks its own GPU by LOCAL_RANK, so all stay visible
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        job_id = submitit.JobEnvironment().job_id
        folder = self.config.checkpoint.output_dir.replace("%j", job_id)
        requeue: Any = signal.getsignal(signal.SIGUSR2)  # submitit's; the run listens itself
        try:
            run(replace(self.config, checkpoint=replace(self.config.checkpoint, output_dir=folder)))
        except Stopped as stopped:
            if stopped.number == signal.SIGUSR2:
                requeue(stopped.number, None)  # rank 0 does, and leaves; Slurm ends the others
                time.sleep(60)
            sys.exit(stopped.status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called before the time limit: the requeued job resumes the newest checkpoint."""
        return submitit.helpers.DelayedSubmission(self)


def job_parameters(slurm: SlurmConfig) -> dict[str, Any]:
    """What the job asks for, in submitit's names. Sizes a GPU: 40 GB of memory, 10 CPUs."""
    parameters: dict[str, Any] = {
        "name": slurm.job_name,
        "nodes": slurm.nodes,
        "gpus_per_node": slurm.ngpus,
        "tasks_per_node": slurm.ngpus,
        "cpus_per_task": 10,
        "mem_gb": 40 * slurm.ngpus,
        "timeout_min": 60 * slurm.timeout,
        "slurm_signal_delay_s": 120,
    }
    if slurm.partition:
        parameters["slurm_partition"] = slurm.partition
    if slurm.use_volta32:
        parameters["slurm_constraint"] = "volta32gb"
    if slurm.comment:
        parameters["slurm_comment"] = slurm.comment
    return parameters


def plan(argv: list[str] | None = None) -> tuple[Config, SlurmConfig, Path]:
    """The training's flags with output_dir filled in, the job's, and the folder of its logs."""
    config, (slurm,) = parse_args_with(argv, SlurmConfig)
    for name in ("ngpus", "nodes", "timeout"):
        if getattr(slurm, name) < 1:
            raise UserError(f"--{name} {getattr(slurm, name)}: has to be at least 1")
    folder = slurm.job_dir or "logs/%j"
    if not config.checkpoint.output_dir:
        config = replace(config, checkpoint=replace(config.checkpoint, output_dir=folder))
    return config, slurm, Path(folder)


def main() -> None:
    try:
        config, slurm, folder = plan()
    except UserError as error:
        sys.exit(f"run_with_submitit.py: error: {error}")
    parameters = job_parameters(slurm)
    if slurm.dry_run:
        default = Config().flat()
        flags = {k: v for k, v in config.flat().items() if v != default[k]}
        shown = {"job": parameters, "folder": str(folder), "main.py": flags}
        sys.stdout.write(yaml.safe_dump(shown, sort_keys=False))
        return
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=30)
    except RuntimeError as error:  # there is no Slurm on this machine
        sys.exit(f"run_with_submitit.py: error: {error}; --dry_run true only prints the job")
    executor.update_parameters(**parameters)
    job = executor.submit(Job(config))
    sys.stdout.write(f"submitted job {job.job_id}; logs in {job.paths.folder}\n")


if __name__ == "__main__":
    main()
