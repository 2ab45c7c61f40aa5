"""One GPU through torchrun and NCCL: training, resume and evaluation, in half precision."""

import json
import re

import pytest
import torch

from tests.integration.conftest import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "main.py")


@pytest.mark.parametrize("compile_it", ["false", "true"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", ["hornet_tiny_7x7", "hornet_tiny_gf"])
def test_training_resume_and_evaluation(flags, tmp_path, model, dtype, compile_it):
    command = [*TORCHRUN, *flags, "--device", "cuda", "--model", model, "--model_kwargs", "{}"]
    command += ["--input_size", "64", "--drop_path", "0.1", "--clip_grad", "1"]
    command += ["--use_amp", "true", "--amp_dtype", dtype, "--compile", compile_it]
    command += ["--model_ema", "true", "--model_ema_eval", "true", "--output_dir", str(tmp_path)]
    first = launch(*command, "--epochs", "1")
    assert first.returncode == 0, first.stderr
    assert "cuda:0, 1 process(es)" in first.stdout
    second = launch(*command, "--epochs", "2")
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stdout
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert all(torch.tensor(record["train_loss"]).isfinite() for record in records)
    path = tmp_path / "checkpoint-1.pth"
    done = launch(*command, "--eval", "true", "--resume", path)
    assert done.returncode == 0, done.stderr
    for title, suffix in (("test", ""), ("test EMA", "_ema")):
        found = re.search(rf"{title} on 33 images: top-1 (\S+)%.*loss (\S+)", done.stdout)
        assert found
        assert float(found[1]) == pytest.approx(records[-1][f"test_acc1{suffix}"], abs=3.1)
        assert float(found[2]) == pytest.approx(records[-1][f"test_loss{suffix}"], rel=0.02)
