"""tools.flops on configs: the published FLOPs, within 0.2 per cent."""

from pathlib import Path

import pytest

from tools import flops

ROOT = Path(__file__).parents[2]
# of Cascade Mask R-CNN at 1280 x 800, and of UPerNet at 2048 x 512 (L: 2560 x 640)
PUBLISHED = {
    "tiny_7x7": (730, 926),
    "tiny_gf": (728, 924),
    "small_7x7": (830, 1030),
    "small_gf": (827, 1027),
    "base_7x7": (969, 1174),
    "base_gf": (965, 1171),
    "large_7x7": (1363, 2473),
    "large_gf": (1358, 2465),
}


@pytest.mark.parametrize("arch", PUBLISHED)
@pytest.mark.parametrize("column", [0, 1], ids=["detection", "segmentation"])
def test_published_flops(arch, column, capsys):
    task = ["object_detection", "semantic_segmentation"][column]
    (config,) = (ROOT / task / "configs/hornet").glob(f"*hornet_{arch}_*.py")
    assert flops.main([str(config)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert float(lines[-1][-1]) == pytest.approx(PUBLISHED[arch][column], rel=0.002)
    parts = [line for line in lines[1:-1] if line[0] != "only"]
    assert sum(float(line[-1]) for line in parts) == pytest.approx(float(lines[-1][-1]), abs=0.5)
    counts = [int(line[-2].replace(",", "")) for line in (*parts, lines[-1])]
    rest = [int(line[-1].replace(",", "")) for line in lines if line[0] == "only"]
    assert sum(counts[:-1]) + sum(rest) == counts[-1]


def test_other_sizes_and_models(capsys):
    config = ROOT / "object_detection/configs/demo/mask_rcnn_shapes.py"
    assert flops.main([str(config), "--input-size", "128", "192"]) == 0
    assert "192 x 128 pixels" in capsys.readouterr().out
    (dino,) = (ROOT / "object_detection/configs/dino").iterdir()
    assert flops.main([str(dino)]) == 1
    assert "a DINO cannot be counted" in capsys.readouterr().err
    assert flops.main(["hornet_tiny_gf", "--input-size", "128", "192"]) == 0
    assert "128 x 192 pixels" in capsys.readouterr().out
