"""What several processes have to agree on."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import main
from config.command_line import parse_args
from engine import train_step
from input_pipeline.listing import Listing, listed_once
from runtime.distributed import all_gather, init_distributed, shared_on_machine
from runtime.errors import UserError
from runtime.logging import Throughput
from tests.integration.conftest import ROOT, launch
from training.build import build_model, build_training

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = [
    *("--model", "hornet_atto_7x7", "--input_size", "32", "--batch_size", "4"),
    *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
    *("--mixup", "0", "--cutmix", "0", "--epochs", "2", "--warmup_epochs", "0"),
]


def train_with_one_bad_batch(opt):
    """In each of two processes; only the images of the second one are no numbers, once."""
    torch.set_num_threads(1)
    context = init_distributed(device="cpu")
    config = parse_args([*SMALL, "--opt", opt])
    torch.manual_seed(0)
    state, setup = build_training(config, build_model(config.model, 3), 32, 3, context)
    weights = torch.nn.utils.parameters_to_vector(state.bare_model.parameters())
    for step, is_bad in enumerate((False, True, False)):
        images = torch.randn(4, 3, 32, 32)
        if is_bad and context.rank == 1:
            images[0] = float("nan")
        setup.schedule.apply(state.optimizer, step)
        train_step(state, setup, iter([(images, torch.tensor([0, 1, 2, 0]))]), Throughput())
        before = weights
        weights = torch.nn.utils.parameters_to_vector(state.bare_model.parameters()).detach()
        assert torch.equal(weights, before) == is_bad
        everywhere = all_gather(weights, context)
        assert torch.equal(everywhere[0], everywhere[1])
        assert state.nonfinite.counts[2] == (step >= 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
@pytest.mark.slow
def test_a_gradient_that_is_not_finite_in_one_process_counts_in_all(opt, tmp_path):
    script = f"from {__name__} import train_with_one_bad_batch as run; run({opt!r})"
    (tmp_path / "worker.py").write_text(script)
    done = launch(*TWO, tmp_path / "worker.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_statistics_of_batch_norms_are_those_that_are_saved(flags, tmp_path, capsys):
    flags = [*flags, "--model", "resnet10t", "--model_kwargs", "{}", "--epochs", "1"]
    average = ["--model_ema", "true", "--model_ema_decay", "0.9", "--model_ema_eval", "true"]
    done = launch(*TWO, "main.py", *flags, *average, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "log.txt").read_text())
    saved = ["--eval", "true", "--resume", str(tmp_path / "checkpoint-0.pth")]
    main.run(parse_args([*flags, "--model_ema_eval", "true", *saved]))
    printed = capsys.readouterr().out
    assert f"loss {record['test_loss']:.4f}" in printed
    assert f"loss {record['test_loss_ema']:.4f}" in printed


def list_in_two_processes(folder):
    """One of them makes the value, or each, if they are on two machines."""
    torch.set_num_threads(1)
    context = init_distributed(device="cpu")
    made = []

    def make():
        made.append(context.rank)
        return {"labels": torch.arange(1000) + len(machine), "names": ["a", "b"]}

    for machine, local_rank in (("", context.rank), (f"node{'x' * context.rank}", 0)):
        name = machine or os.uname().nodename
        with patch("os.uname", lambda name=name: SimpleNamespace(nodename=name)):
            made.clear()
            value = shared_on_machine(make, replace(context, local_rank=local_rank))
        assert len(made) == (local_rank == 0)
        assert value["names"] == ["a", "b"]
        assert torch.equal(value["labels"], torch.arange(1000) + len(machine))

    def fail():
        raise UserError("there are no images")

    with pytest.raises(UserError, match="there are no images"):
        shared_on_machine(fail, context)
    listing = Listing.of("data", ["a"], [(0, f"a/{i}.jpg") for i in range(3 + context.rank)], {})
    with pytest.raises(UserError, match="data differs between the machines: 3 and 4 images"):
        listed_once(lambda: listing, replace(context, local_rank=0))
    dist.barrier()
    assert list(Path(folder).glob("hornet-*")) == []
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_machine_lists_its_images_once(tmp_path):
    script = f"from {__name__} import list_in_two_processes as run; run({str(tmp_path)!r})"
    (tmp_path / "worker.py").write_text(script)
    done = launch(*TWO, tmp_path / "worker.py", PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
