"""Processes: who we are, and what crosses between us."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runtime.errors import UserError


@dataclass(frozen=True)
class DistributedContext:
    """This process among all of the run. Without a launcher: rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def init_distributed(device: str = "auto", local_rank: int = -1) -> DistributedContext:
    """Joins the process group that torchrun or torch.distributed.launch describes.

    RANK, WORLD_SIZE and LOCAL_RANK are read from the environment; `local_rank` counts only where
    the last one is missing. NCCL connects GPUs, gloo CPUs. One process needs no group.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", max(0, local_rank)))
    context = DistributedContext(rank, local_rank, world_size, _choose(device, local_rank))
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    if context.is_distributed:
        dist.init_process_group("nccl" if context.device.type == "cuda" else "gloo")
    return context


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


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
