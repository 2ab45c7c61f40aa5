"""Who a process is, by its environment and flags."""

import pytest
import torch

from runtime.distributed import _ranks, init_distributed
from runtime.errors import UserError

OMPI = {f"OMPI_COMM_WORLD_{name}": str(i) for i, name in enumerate(["RANK", "SIZE", "LOCAL_RANK"])}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
NO_FLAGS = {"local_rank": -1, "world_size": 1, "dist_on_itp": False}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, {}, (0, 1, 0)),
        (TORCHRUN, {}, (5, 8, 1)),
        (TORCHRUN, {"local_rank": 0}, (5, 8, 1)),  # a saved recipe may hold the flag
        (TORCHRUN | SRUN, {}, (5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, {"local_rank": 3}, (5, 8, 3)),
        (SRUN, {}, (0, 1, 0)),
        (SRUN, {"world_size": 4}, (3, 4, 1)),
        (OMPI, {"dist_on_itp": True}, (0, 1, 2)),
    ],
)
def test_ranks(environment, flags, expected):
    assert _ranks(environment, **NO_FLAGS | flags) == expected


@pytest.mark.parametrize(
    ("environment", "flags"),
    [({}, {"dist_on_itp": True}), ({"RANK": "x"}, {}), ({}, {"world_size": 2})],
)
def test_missing_ranks_are_one_line(environment, flags):
    with pytest.raises(UserError, match="ranks?"):
        _ranks(environment, **NO_FLAGS | flags)


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    context = init_distributed(device="cpu")
    assert context.is_main
    assert not context.is_distributed
    assert not torch.distributed.is_initialized()


def test_unknown_meeting_place_is_one_line(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--dist_url nowhere://"):
        init_distributed(device="cpu", dist_url="nowhere://")


def test_more_processes_than_gpus(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            init_distributed(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="finds 2 GPUs"):
        init_distributed(device="cuda", local_rank=2)
