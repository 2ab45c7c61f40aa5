"""The processes of a run: rank, world size, and collective operations."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from runtime.errors import UserError

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(hours=12)
"""For one process per machine to download, or to list ImageNet-22K on a slow file system."""


@dataclass(frozen=True)
class DistributedContext:
    """This process among all of the run. Without a launcher: rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """Gloo group for tensors on CPUs; None if the default group is gloo itself."""
    monitor: Any = None
    """Gloo group of `absent_ranks`: after a time-out the other groups are unusable."""
    patient: Any = None
    """Gloo group to wait for downloads and listings, which take longer than --dist_timeout."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, even one of a single process."""
        return dist.is_initialized()


SINGLE_PROCESS = DistributedContext(0, 0, 1, torch.device("cpu"))


def init_distributed(
    device: str = "auto",
    local_rank: int = -1,
    world_size: int = 1,
    dist_url: str = "env://",
    dist_timeout: float = 30.0,
    dist_on_itp: bool = False,
) -> DistributedContext:
    """Join the process group that the launcher describes: NCCL for GPUs, gloo for CPUs.

    The arguments are the flags of the same names (config/flags.py). A single process needs no
    group, but gets one under torchrun, so that it runs the same code as many processes.

    Raises:
        UserError: there is no such device, or the processes don't find each other.
    """
    rank, world_size, local_rank = _ranks(os.environ, local_rank, world_size, dist_on_itp)
    context = DistributedContext(rank, local_rank, world_size, _choose(device, local_rank))
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    if world_size == 1 and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        return context
    backend = "nccl" if context.device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=dist_timeout)
    try:
        store = meeting_place(dist_url, rank, world_size, timeout)
        dist.init_process_group(
            backend, store=store, timeout=timeout, world_size=world_size, rank=rank
        )
        # absent_ranks is called after a time-out already
        monitor = dist.new_group(timeout=min(timeout, timedelta(minutes=1)), backend="gloo")
        control = dist.new_group(timeout=timeout, backend="gloo") if backend == "nccl" else None
        patient = dist.new_group(timeout=max(timeout, LONGEST_WAIT), backend="gloo")
        context = replace(context, monitor=monitor, control=control, patient=patient)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {rank} of {world_size} finds no others by --dist_url {dist_url}: {error}"
        ) from None
    if context.device.type == "cuda":
        _check_own_gpus(context)
    return context


def meeting_place(url: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store through which the processes exchange their addresses.

    torchrun keeps its store when it restarts the processes (torch 2.15): without a prefix they
    would find the addresses of the previous ones. Only a single agent is certain to give all ranks
    the same restart count.
    """
    store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    return store


def _ranks(
    environment: Mapping[str, str], local_rank: int, world_size: int, dist_on_itp: bool
) -> tuple[int, int, int]:
    """Return rank, world size and local rank."""
    if dist_on_itp:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {"LOCAL_RANK": str(max(0, local_rank)), **environment}
    elif "SLURM_PROCID" in environment and world_size > 1:
        # batch scripts have a SLURM_PROCID too, so --world_size has to ask for srun's processes
        names = ("SLURM_PROCID", "", "SLURM_LOCALID")
        environment = {"": str(world_size), "SLURM_LOCALID": "0", **environment}
    elif world_size > 1:
        raise UserError(
            f"--world_size {world_size}: this process has no rank, start torchrun or srun"
        )
    else:
        return 0, 1, max(0, local_rank)
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
        return rank, world_size, local_rank
    except (KeyError, ValueError) as error:
        raise UserError(f"the environment lacks the ranks of this process: {error}") from None


def _choose(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: give auto, cuda or cpu")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine offers no GPU; use --device auto or cpu")
    count = torch.cuda.device_count()
    if count == 1:  # perhaps of several, of which each process sees its own (--gpus-per-task=1)
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"--device cuda: process {local_rank} of this machine finds {count} GPUs; start fewer "
            "processes"
        )
    return torch.device("cuda", local_rank)


def _check_own_gpus(context: DistributedContext) -> None:
    """Refuse processes that share a GPU; NCCL would, with pages of text."""
    own = os.uname().nodename, str(torch.cuda.get_device_properties(context.device).uuid)
    places = all_gather(own, context)
    sharing = [rank for rank, place in enumerate(places) if places.count(place) > 1]
    if sharing:
        raise UserError(
            f"--device cuda: processes {', '.join(map(str, sharing))} share GPUs of "
            f"{places[sharing[0]][0]}: start one process per GPU"
        )


def close_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def naming_absent_ranks(context: DistributedContext, dist_timeout: float) -> Iterator[None]:
    """Turn errors of the process group into a UserError that names the ranks that don't answer."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        absent = ", ".join(map(str, absent_ranks(context)))
        who = f"rank {absent} of {context.world_size}" if absent else "another process"
        raise UserError(
            f"{who} does not answer (ended, or for longer than --dist_timeout {dist_timeout:g}): "
            f"see its output; {error}"
        ) from None


def absent_ranks(context: DistributedContext) -> list[int]:
    """Return the ranks that don't answer within ten seconds."""
    if context.monitor is None:
        return []
    try:
        dist.monitored_barrier(context.monitor, timedelta(seconds=10), wait_all_ranks=True)
    except RuntimeError as error:
        found = re.search(r"[Rr]anks? ([\d, ]+) failed to pass|from rank (\d+)", str(error))
        if found:
            return [int(rank) for rank in (found[1] or found[2]).split(",")]
    return []


@contextmanager
def first_on_each_machine(context: DistributedContext) -> Iterator[None]:
    """Run the body in one process per machine first: it fetches what the others share."""
    if context.local_rank:
        _wait_long(context)
    try:
        yield
    finally:  # after an error too, so that the others don't wait but get the same error
        if not context.local_rank:
            _wait_long(context)


def _wait_long(context: DistributedContext) -> None:
    if dist.is_initialized():  # not by NCCL, whose watchdog ends a run that waits
        dist.barrier(context.patient)


def shared_on_machine(
    make: Callable[[], dict[str, Any]], context: DistributedContext
) -> dict[str, Any]:
    """Return make() of one process per machine, tensors and plain values, on all ranks.

    All ranks map its tensors from the same file, so that a machine holds them once. A UserError of
    `make` is raised on all ranks.
    """
    if not context.is_distributed:
        return make()
    host, file, problem = "", "", ""
    with first_on_each_machine(context):
        if not context.local_rank:
            host = os.uname().nodename
            try:
                value = make()
                handle, file = tempfile.mkstemp(prefix="hornet-", suffix=".pt")
                with open(handle, "wb") as opened:
                    torch.save(value, opened)
            except (OSError, RuntimeError) as error:  # torch's own for a full disk
                problem = f"{file or tempfile.gettempdir()} (see TMPDIR) cannot be written: {error}"
            except UserError as error:
                problem = str(error)
    notes = all_gather((host, file, problem), context)
    problem = next((problem for *_, problem in notes if problem), "")
    if not problem:
        # the first process of a machine has the lowest rank on it
        upwards = reversed(notes[: context.rank + 1])
        path = next(path for host, path, _ in upwards if host == os.uname().nodename)
        value = torch.load(path, mmap=True, weights_only=True)
    barrier()
    if file:
        Path(file).unlink(missing_ok=True)
    if problem:
        raise UserError(problem)
    return value


def of_main(make: Callable[[], Value], context: DistributedContext) -> Value:
    """Return make() of rank 0, a plain value, on all ranks.

    A UserError of it is raised on rank 0, which tells it; the other ranks exit with status 1.
    """
    value: Any = None
    problem = ""
    if context.is_main:
        try:
            value = make()
        except UserError as error:
            problem = str(error)
    value, problem = all_gather((value, problem), context)[0]
    if problem and context.is_main:
        raise UserError(problem)
    if problem:
        raise SystemExit(1)
    return value


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(model: nn.Module, context: DistributedContext) -> None:
    """Give all ranks the buffers of rank 0: the statistics of batch norms differ."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        group = context.control if buffer.device.type == "cpu" else None
        dist.broadcast(buffer, src=0, group=group)


def all_gather(value: Value, context: DistributedContext) -> list[Value]:
    """Return the values of all ranks in their order; tensors have to be on the CPU."""
    values = [value] * context.world_size
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=context.control)
    return values


def shard(length: int, batch_size: int, rank: int, world_size: int) -> list[int]:
    """Return the items of a rank: ranks take whole batches in turn, without padding."""
    starts = range(rank * batch_size, length, world_size * batch_size)
    return [i for start in starts for i in range(start, min(start + batch_size, length))]


def all_gather_shards(
    rows: torch.Tensor, batch_size: int, context: DistributedContext
) -> torch.Tensor:
    """Return the rows of all ranks' `shard`s in the order of the whole."""
    shards = all_gather(rows, context)
    # a rank without items does not know the shape of the others'
    whole = shards[0].new_empty(sum(map(len, shards)), *shards[0].shape[1:])
    for rank, part in enumerate(shards):
        if len(part):
            whole[shard(len(whole), batch_size, rank, context.world_size)] = part
    return whole
