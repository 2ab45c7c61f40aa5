"""Processes of a run: rank and world size, and what they exchange."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from runtime.errors import UserError

MONITOR_TIMEOUT = timedelta(minutes=1)


@dataclass(frozen=True)
class DistributedContext:
    """This process among all of the run. Without a launcher: rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """A gloo group for values on CPUs; None for the default group, which then is one of gloo."""
    monitor: Any = None
    """A gloo group for `absent_ranks` alone: other groups are broken after a time-out."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, even of this process alone."""
        return dist.is_initialized()


SINGLE_PROCESS = DistributedContext(0, 0, 1, torch.device("cpu"))
"""A program that is one process by itself, on the CPU."""


def init_distributed(
    device: str = "auto",
    local_rank: int = -1,
    world_size: int = 1,
    dist_url: str = "env://",
    dist_timeout: float = 30.0,
    dist_on_itp: bool = False,
) -> DistributedContext:
    """Joins the process group that the launcher describes: NCCL connects GPUs, gloo CPUs.

    torchrun and torch.distributed.launch set RANK, WORLD_SIZE and LOCAL_RANK; `local_rank` counts
    only where the last one is missing. One process needs no group, but has one of its own under
    torchrun, so that it runs what many processes would.

    Args:
        device: auto, cuda or cpu.
        local_rank, world_size, dist_url, dist_timeout, dist_on_itp: The flags of these names.

    Raises:
        UserError: there is no such device, or the processes don't find each other.
    """
    ranks = _ranks(os.environ, local_rank, world_size, dist_on_itp)
    rank, world_size, local_rank = ranks
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
        # whoever asks for absent ranks has waited for long already
        monitor = dist.new_group(timeout=min(timeout, MONITOR_TIMEOUT), backend="gloo")
        control = dist.new_group(timeout=timeout, backend="gloo") if backend == "nccl" else None
        return replace(context, monitor=monitor, control=control)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {rank} of {world_size} finds no others by --dist_url {dist_url}: {error}"
        ) from None


def meeting_place(url: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store in which the processes leave their addresses for each other.

    torchrun keeps its store when it restarts the processes (torch 2.15), so that without a prefix
    they would find the addresses of dead ones. The restart's number is known to be the same on all
    ranks only where one agent starts them all.
    """
    store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    return store


def _ranks(
    environment: Mapping[str, str], local_rank: int, world_size: int, dist_on_itp: bool
) -> tuple[int, int, int]:
    """(rank, world size, rank on this machine)."""
    if dist_on_itp:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        default = str(max(0, local_rank))
        environment = {"LOCAL_RANK": default, **environment}
    elif "SLURM_PROCID" in environment and world_size > 1:
        # a batch script has a SLURM_PROCID too, so that the number of processes has to be asked for
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
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--device cuda: process {local_rank} of this machine finds "
            f"{torch.cuda.device_count()} GPUs; start fewer processes"
        )
    return torch.device("cuda", local_rank)


def close_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def naming_absent_ranks(context: DistributedContext, dist_timeout: float) -> Iterator[None]:
    """Turns errors of the process group into a UserError that names the ranks that don't answer."""
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


def absent_ranks(context: DistributedContext, seconds: float = 10.0) -> list[int]:
    """The ranks that do not answer within so many seconds; asked by those left waiting."""
    if context.monitor is None:
        return []
    wait = timedelta(seconds=seconds)
    try:
        dist.monitored_barrier(context.monitor, wait, wait_all_ranks=True)
    except RuntimeError as error:
        found = re.search(r"[Rr]anks? ([\d, ]+) failed to pass|from rank (\d+)", str(error))
        if found:
            return [int(rank) for rank in (found[1] or found[2]).split(",")]
    return []


@contextmanager
def first_on_each_machine(context: DistributedContext) -> Iterator[None]:
    """One process of each machine runs the body before the others: it fetches what they share."""
    if context.local_rank:
        barrier()
    try:
        yield
    finally:  # after an error too, which the others then meet themselves instead of waiting
        if not context.local_rank:
            barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(model: nn.Module, context: DistributedContext) -> None:
    """Gives all processes the buffers of the main one: the statistics of batch norms differ."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        group = context.control if buffer.device.type == "cpu" else None
        dist.broadcast(buffer, src=0, group=group)


def broadcast(value: str, context: DistributedContext) -> str:
    """The main process's value, in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, group=context.control)
    return values[0]


def all_gather(tensor: torch.Tensor, context: DistributedContext) -> torch.Tensor:
    """(world_size, ...): the tensors of all processes, which are on the CPU and of one shape."""
    gathered: list[torch.Tensor] = [tensor] * context.world_size
    if dist.is_initialized():
        dist.all_gather_object(gathered, tensor, group=context.control)
    return torch.stack(gathered)


def shard(length: int, batch_size: int, rank: int, world_size: int) -> list[int]:
    """The items of a process, where the processes take turns at whole batches, without padding."""
    starts = range(rank * batch_size, length, world_size * batch_size)
    return [i for start in starts for i in range(start, min(start + batch_size, length))]


def all_gather_shards(
    rows: torch.Tensor, batch_size: int, context: DistributedContext
) -> torch.Tensor:
    """The rows that all processes have of their `shard`, in the order of the whole."""
    if not dist.is_initialized():
        return rows
    shards: list[torch.Tensor] = [rows] * context.world_size
    dist.all_gather_object(shards, rows, group=context.control)
    whole = torch.empty(sum(map(len, shards)), rows.shape[1], dtype=rows.dtype)
    for rank, part in enumerate(shards):
        whole[shard(len(whole), batch_size, rank, context.world_size)] = part
    return whole
