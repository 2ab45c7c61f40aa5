"""Submit main.py as a Slurm job: the flags below, and all of main.py's.

python run_with_submitit.py --nodes 4 --ngpus 8 --config recipes/imagenet1k/hornet_tiny_7x7.yaml \
    --data_path /path/to/imagenet-1k --job_dir ./logs/hornet_tiny_7x7
"""

import math
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import submitit
import yaml

from config.command_line import parse_args_with
from config.flags import Config, Range
from runtime.errors import UserError


@dataclass(frozen=True)
class SlurmConfig:
    """Slurm"""

    cluster: Literal["slurm", "local"] = "slurm"
    """slurm, or local for this machine, without Slurm."""
    ngpus: Annotated[int, Range(0)] = 8
    """GPUs per node, with one process each; 0 for one process per node, on the CPU."""
    nodes: Annotated[int | None, Range(1)] = None
    """Number of nodes; 2 if not given, 1 with --cluster local."""
    timeout: float = 72
    """Time limit in hours; a job that reaches it is requeued and continues."""
    job_name: str = "hornet"
    """Name of the job."""
    job_dir: str = ""
    """Folder for the job's logs, and for output_dir if that isn't given; %j is the job's number.
    logs/%j if not given."""
    partition: str = ""
    """Partition; the cluster's default if not given."""
    account: str = ""
    """Account to charge."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that nodes must have."""
    use_volta32: bool = False
    """The same as --constraint volta32gb."""
    comment: str = ""
    """Comment of the job."""
    mem_gb: Annotated[float | None, Range(0)] = None
    """Memory per node in GB; 40 per process if not given."""
    cpus_per_task: Annotated[int, Range(1)] = 10
    """CPUs per process."""
    signal_delay_s: Annotated[int, Range(0)] = 120
    """Seconds before the time limit at which the job saves and is requeued."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch: '{"reservation": "night", "exclude": "node7"}'."""
    dry_run: bool = False
    """Print the script for sbatch (with --cluster local: the parameters) instead of submitting."""


class Job:
    """Runs main.py in each process of the job; submitit pickles it."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self) -> None:
        # imported in the job: submitting needs neither torch nor a GPU
        from main import run
        from runtime.distributed import close_distributed
        from runtime.signals import Stopped, ignore_signals

        # each process chooses its GPU by LOCAL_RANK, so all stay visible
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        job = submitit.JobEnvironment()
        folder = self.config.checkpoint.output_dir.replace("%j", job.job_id)
        requeue: Any = signal.getsignal(signal.SIGUSR2)  # submitit's handler; run() replaces it
        try:
            run(replace(self.config, checkpoint=replace(self.config.checkpoint, output_dir=folder)))
            ignore_signals()  # one while Python ends would make a finished job a failed one
            close_distributed()  # otherwise NCCL warns, and may hang at exit
        except Stopped as stopped:
            close_distributed()
            if stopped.number == signal.SIGUSR2:
                requeue(stopped.number, None)  # rank 0 requeues and exits; Slurm ends the others
            on_slurm = job.cluster == "slurm" and stopped.number == signal.SIGTERM
            if on_slurm or stopped.number == signal.SIGUSR2:
                # until Slurm ends it; after SIGTERM too: only running jobs are requeued
                time.sleep(600)
            sys.exit(stopped.status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit to requeue the job, which resumes the newest checkpoint."""
        return submitit.helpers.DelayedSubmission(self)


class SlurmScript(submitit.SlurmExecutor):
    """submitit's executor, which shows its script even without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "")


def build_executor(slurm: SlurmConfig, folder: Path) -> SlurmScript | submitit.LocalExecutor:
    processes = max(1, slurm.ngpus)
    minutes = math.ceil(60 * slurm.timeout)
    # the job has to find these modules, wherever it is submitted from
    setup = [f"export PYTHONPATH={shlex.quote(str(Path(__file__).resolve().parent))}:$PYTHONPATH"]
    if slurm.cluster == "local":
        local = submitit.LocalExecutor(folder)
        local.update_parameters(
            tasks_per_node=processes, gpus_per_node=slurm.ngpus, timeout_min=minutes, setup=setup
        )
        return local
    memory = 40 * processes if slurm.mem_gb is None else slurm.mem_gb
    executor = SlurmScript(folder, max_num_timeout=10**6)  # requeued as often as necessary
    executor.update_parameters(
        **{n: getattr(slurm, n) or None for n in ("partition", "account", "qos", "comment")},
        job_name=slurm.job_name,
        constraint=slurm.constraint or ("volta32gb" if slurm.use_volta32 else None),
        nodes=slurm.nodes or 2,
        gpus_per_node=slurm.ngpus,
        ntasks_per_node=processes,
        cpus_per_task=slurm.cpus_per_task,
        mem=f"{round(1024 * memory)}MB",
        time=minutes,
        signal_delay_s=slurm.signal_delay_s,
        # srun no longer inherits it from sbatch (Slurm 22.05); no process waits for a dead one
        srun_args=[f"--cpus-per-task={slurm.cpus_per_task}", "--kill-on-bad-exit=1"],
        additional_parameters=slurm.sbatch,
        setup=setup,
    )
    return executor


def plan(argv: list[str] | None = None) -> tuple[Config, SlurmConfig, Path]:
    """Return the flags of main.py with an output_dir, those of the job, and the log folder."""
    config, (slurm,) = parse_args_with(argv, SlurmConfig)
    if not slurm.timeout > 0:
        raise UserError(f"--timeout {slurm.timeout}: has to be above 0")
    if slurm.cluster == "slurm" and 3600 * slurm.timeout <= slurm.signal_delay_s:
        raise UserError(
            f"--timeout {slurm.timeout} hours are not longer than --signal_delay_s "
            f"{slurm.signal_delay_s}: the job would save and requeue without training"
        )
    if slurm.cluster == "local" and (slurm.nodes or 1) > 1:
        raise UserError(f"--nodes {slurm.nodes}: --cluster local is a single machine")
    folder = slurm.job_dir or "logs/%j"
    if not config.checkpoint.output_dir:
        config = replace(config, checkpoint=replace(config.checkpoint, output_dir=folder))
    return config, slurm, Path(folder)


def shown(config: Config, executor: SlurmScript | submitit.LocalExecutor) -> str:
    """Return the script, or a local job's parameters, and the flags of main.py as a comment."""
    default = Config().flat()
    flags = {name: value for name, value in config.flat().items() if value != default[name]}
    if isinstance(executor, SlurmScript):
        job = executor.text()
    else:
        job = yaml.safe_dump(executor.parameters)
    comment = "".join(f"# {line}\n" for line in yaml.safe_dump({"main.py": flags}).splitlines())
    return f"{job}\n{comment}"


def main() -> None:
    try:
        config, slurm, folder = plan()
        executor = build_executor(slurm, folder)
        if slurm.dry_run:
            sys.stdout.write(shown(config, executor))
            return
        if slurm.cluster == "slurm" and not shutil.which("sbatch"):
            raise UserError(
                "this machine has no sbatch: --dry_run true prints the job, --cluster local runs "
                "it here"
            )
        job = executor.submit(Job(config))
    except (UserError, OSError, submitit.core.utils.FailedJobError) as error:
        sys.exit(f"run_with_submitit.py: error: {' '.join(str(error).split())}")
    sys.stdout.write(f"submitted job {job.job_id}; logs in {job.paths.folder}\n")


if __name__ == "__main__":
    main()
