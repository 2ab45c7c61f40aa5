"""A Slurm cluster of two nodes on this machine, without systemd and without a file under /etc."""

import os
import random
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
PACKAGES = "slurmctld slurmd slurm-client munge"
# the training's MASTER_ADDR is a node's name, so that names have to be addresses
NODES = ("127.0.0.2", "127.0.0.3")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=5
MinJobAge=600
ReturnToService=2
FirstJobId={first_job}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no cluster here, '' if there can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"no {missing[0]}: apt-get install {PACKAGES}"
    return "" if os.geteuid() == 0 else "the test's Slurm runs as root"


class Cluster:
    """Starts in `folder`, which has to be empty; `stop` ends all that it has started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[psutil.Popen] = []
        for name in ("munge", "run", "log", "state", "spool"):
            (folder / name).mkdir()
        for name in NODES:
            (folder / "spool" / name).mkdir()
        (folder / "munge").chmod(0o711)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(random.randbytes(128))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        host = socket.gethostname().partition(".")[0]
        memory = psutil.virtual_memory().total // 2**20 // 2
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + place} "
            f"CPUs={os.cpu_count()} RealMemory={memory}"
            for place, name in enumerate(NODES)
        ]
        first_job = random.randrange(1000, 50000)  # submitit draws the training's port by it
        text = CONFIG.format(
            host=host, port=port, base=folder, first_job=first_job, nodes="\n".join(nodes)
        )
        (folder / "slurm.conf").write_text(text)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        flags = [f"--{flag}={munge / name}" for flag, name in files.items()]
        self._daemon("munged", "--foreground", *flags, f"--seed-file={munge / 'seed'}")
        self._wait(lambda: (munge / "socket").exists(), "munged does not start")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        ready = "127.0.0.[2-3] idle"
        self._wait(lambda: ready in self.run("sinfo", "-h", "-p", "low", "-o", "%N %T"), "no nodes")

    def _daemon(self, *command: str) -> None:
        with (self.folder / "log" / f"{command[0]}-{len(self.processes)}.txt").open("w") as log:
            started = psutil.Popen(
                [shutil.which(command[0]), *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(started)

    def _wait(self, condition, message: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = sorted((self.folder / "log").iterdir())
                tails = "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in logs)
                raise TimeoutError(f"{message}\n{tails}")
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30
        )
        return result.stdout + result.stderr

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", number)))

    def wait_for(self, number: str, state: str, seconds: float = 240) -> dict[str, str]:
        """Until the job is in that state."""
        self._wait(
            lambda: self.job(number).get("JobState") == state,
            f"job {number} does not become {state}: {self.job(number)}",
            seconds,
        )
        return self.job(number)

    def reconfigure(self, old: str, new: str) -> None:
        """Puts another line of slurm.conf in the place of `old`."""
        path = self.folder / "slurm.conf"
        path.write_text(path.read_text().replace(old, new))
        self.run("scontrol", "reconfigure")

    def stop(self) -> None:
        if len(self.processes) == 2 + len(NODES):
            self.run("scancel", "-f", "-u", "root")
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in reversed(self.processes):
            for member in [*process.children(recursive=True), process]:
                member.terminate()
        psutil.wait_procs(self.processes, timeout=5)
        for process in self.processes:
            if process.is_running():
                process.kill()
