"""Who a process is, by its environment and flags."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from evaluation import _on_device
from runtime import distributed, signals
from runtime.distributed import DistributedContext, _choose, _ranks, init_distributed
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


def test_a_gpu_of_its_own_for_each_process(monkeypatch):
    """Slurm's --gpus-per-task=1: each process sees a single GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _choose("auto", 3) == torch.device("cuda", 0)
    uuids = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: uuids)
    context = DistributedContext(0, 0, 3, torch.device("cuda", 0))
    places = [("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-2")]
    monkeypatch.setattr(distributed, "all_gather", lambda own, _: places)
    distributed._check_own_gpus(context)
    places[2] = places[0]
    with pytest.raises(UserError, match="processes 0, 2 share GPUs of a: start one process per"):
        distributed._check_own_gpus(context)


def test_ranks_ask_each_other_about_once_a_second(monkeypatch):
    asked, now = [], [0.0]
    monkeypatch.setattr(DistributedContext, "is_distributed", True)
    monkeypatch.setattr(signals.dist, "all_reduce", lambda *_, **__: asked.append(now[0]))
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    watch = signals.Watch(DistributedContext(0, 0, 2, torch.device("cpu")))
    for seconds, most in ((0.25, 1.01), (0.01, 8 * 0.01), (3.0, 8 * 3.0)):
        asked.clear()
        for _ in range(100):
            now[0] += seconds
            watch.ask()
        gaps = [b - a for a, b in pairwise(asked)]
        assert max(gaps) <= most + 1e-6
    assert gaps[-1] == pytest.approx(3.0)  # slow steps are each followed by an answer
    watch._note(signals.signal.SIGTERM, None)
    assert watch.ask() == (False, signals.signal.SIGTERM)


def test_an_ema_in_host_memory_is_evaluated_on_the_device():
    model = torch.nn.Linear(2, 2)
    assert _on_device(model, torch.device("cpu")) is model
    moved = _on_device(model, torch.device("meta"))
    assert next(moved.parameters()).device.type == "meta"
    assert next(model.parameters()).device.type == "cpu"
