"""Processes: who we are, and what crosses between us."""

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

from config import RuntimeConfig
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
    """What crosses between CPUs: a group of gloo; None for the default one, which then is that."""
    monitor: Any = None
    """A group of gloo that nothing but `absent_ranks` uses: others are broken after a time-out."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, be it of this process alone."""
        return dist.is_initialized()


SINGLE_PROCESS = DistributedContext(0, 0, 1, torch.device("cpu"))
"""A program that is one process by itself, on the CPU."""


def init_distributed(config: RuntimeConfig) -> DistributedContext:
    """Joins the process group that the launcher describes: NCCL connects GPUs, gloo CPUs.

    torchrun and torch.distributed.launch set RANK, WORLD_SIZE and LOCAL_RANK; `--local_rank`
    counts only where the last one is missing. One process needs no group, but has one of its own
    under torchrun, so that it runs what many processes would.
    """
    rank, world_size, local_rank = _ranks(config, os.environ)
    context = DistributedContext(rank, local_rank, world_size, _choose(config.device, local_rank))
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    if world_size > 1 or {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=config.dist_timeout)
        try:
            store = meeting_place(config.dist_url, rank, world_size, timeout)
            dist.init_process_group(
                backend, store=store, timeout=timeout, world_size=world_size, rank=rank
            )
            # who asks for absent processes has waited for long already
            monitor = dist.new_group(timeout=min(timeout, MONITOR_TIMEOUT), backend="gloo")
            control = dist.new_group(timeout=timeout, backend="gloo") if backend == "nccl" else None
            context = replace(context, monitor=monitor, control=control)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"process {rank} of {world_size} finds no others by --dist_url {config.dist_url}: "
                f"{error}"
            ) from None
    return context


def meeting_place(url: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Where the processes leave their addresses for each other.

    torchrun keeps its store when it starts the processes again (torch 2.15), so that without a
    prefix they would find the addresses of dead ones. The restart's number is known to be the same
    everywhere only where one agent starts all.
    """
    store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    return store


def _ranks(config: RuntimeConfig, environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, rank on this machine)."""
    if config.dist_on_itp:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        default = str(max(0, config.local_rank))
        environment = {"LOCAL_RANK": default, **environment}
    elif "SLURM_PROCID" in environment and config.world_size > 1:
        # a batch script has a SLURM_PROCID too, so that the number of processes has to be asked for
        names = ("SLURM_PROCID", "", "SLURM_LOCALID")
        environment = {"": str(config.world_size), "SLURM_LOCALID": "0", **environment}
    elif config.world_size > 1:
        raise UserError(
            f"--world_size {config.world_size}: this process has no rank, start torchrun or srun"
        )
    else:
        return 0, 1, max(0, config.local_rank)
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"the environment lacks the ranks of this process: {error}") from None
    return rank, world_size, local_rank


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


def absent_ranks(context: DistributedContext, seconds: float = 10.0) -> list[int]:
    """The processes that do not answer within so many seconds; asked by those left waiting."""
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
