"""Who a process is, by its environment and flags."""

import pytest
import torch

from runtime.distributed import init_distributed
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("environment", "flag", "expected"),
    [(None, -1, 0), (None, 3, 3), ("2", -1, 2), ("2", 0, 2)],  # a saved recipe may hold the flag
)
def test_local_rank(monkeypatch, environment, flag, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if environment:
        monkeypatch.setenv("LOCAL_RANK", environment)
    context = init_distributed("cpu", flag)
    assert (context.local_rank, context.rank, context.world_size) == (expected, 0, 1)
    assert context.is_main
    assert not context.is_distributed


def test_more_processes_than_gpus(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            init_distributed("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="finds 2 GPUs"):
        init_distributed("cuda", 2)
