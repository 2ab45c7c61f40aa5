"""Draws clouds of eight shapes, trains a small HorNet on them by P2P, and shows what it sees.

python -m tools.demo_points
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from checkpoints import fitting, reading
from point_clouds.datasets import build_data
from point_clouds.flags import parse_args
from point_clouds.pictures import draw_votes
from point_clouds.shapes import write_shapes
from tools.demo import ROOT, run, say
from training.build import build_model

CONFIG = "point_clouds/configs/shapes.yaml"
DATA = "data/shapes"


def main() -> int:
    output_dir = Path("runs") / time.strftime("demo-points-%Y%m%d-%H%M%S")
    say(f"drawing clouds into {DATA}")
    write_shapes(ROOT / DATA, train=200, test=40)
    # more flags may follow, such as --seed 1 or --epochs 2
    command = ["-m", "point_clouds.train", CONFIG, "--output_dir", str(output_dir), *sys.argv[1:]]
    say(f"training: python {' '.join(command)}")
    status, folder, best = run(command), ROOT / output_dir, output_dir / "checkpoint-best.pth"
    weights = ROOT / best
    if status or not weights.exists():
        return status
    config = parse_args(["--config", str(folder / "config.yaml")])
    data = build_data(
        config.data, config.augment, config.model.input_size, with_train=False, points=config.points
    )
    model: Any = build_model(config.model, len(data.classes))
    checkpoint = reading.read_checkpoint(weights, model)
    fitting.load_saved(model, checkpoint, reading.weights_in(checkpoint, weights), weights)
    with torch.inference_mode():
        figure = draw_votes(model.eval(), data, count=8)
    figure.savefig(folder / "votes.png", dpi=120)
    say(f"""
the accuracy by the vote of 40 views is in the last lines above
  pictures      {output_dir / "votes.png"}: clouds, their images from four sides, the votes
  curves        {output_dir / "curves.png"}
  predictions   {output_dir / "predictions.csv"}
  weights       {best}

test them again:
  .venv/bin/python -m point_clouds.test {output_dir}/config.yaml {best}""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
