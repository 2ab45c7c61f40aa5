"""Every image counts once, and exactly as in one process, however many processes there are."""

from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist

import models  # noqa: F401
from config.flags import DataConfig
from engine import evaluate
from input_pipeline.image_sets import ImageSet
from input_pipeline.loaders import eval_loader
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import DistributedContext, init_distributed
from tests.integration.conftest import ROOT, launch

LENGTHS = (1, 2, 3, 7, 16, 33)
BATCH_SIZES = (1, 2, 5, 24)


class Images(ImageSet):
    transform = None

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 32, generator=generator), index % 3


def compare(folder):
    """In each process: the metrics of all together are those of one alone, to the last bit."""
    torch.set_num_threads(1)
    together = init_distributed(device="cpu")
    alone = DistributedContext(0, 0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    small = {"base_dim": 16, "depths": [1, 1, 1, 1], "layer_scale_init_value": 0.5}
    model = timm.create_model("hornet_atto_7x7", num_classes=3, **small)
    for length in LENGTHS:
        for batch_size in BATCH_SIZES:
            config = DataConfig(batch_size=batch_size, num_workers=0)
            metrics, rows = [], []
            for context in (together, alone):
                unreadable = UnreadableImages(Path(folder) / "bad_images.txt", 0)
                loader = eval_loader(Images(length), config, context, unreadable)
                turns = loader.batch_size if context is together else None
                results = evaluate(model, loader, context, batch_size=turns)
                metrics.append(results[0])
                rows.append(results[1])
            assert metrics[0] == metrics[1], (length, batch_size, metrics)
            assert metrics[0]["images"] == length
            assert torch.equal(*rows)
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_metrics_are_those_of_one_process(processes, tmp_path):
    script = f"from {__name__} import compare; compare({str(tmp_path)!r})"
    (tmp_path / "worker.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = launch(*launcher, tmp_path / "worker.py", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-3000:]
