"""Trains a small HorNet on handwritten digits with main.py, and shows what it has learnt.

python -m tools.demo
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from inference.classifier import load_classifier
from inference.pictures import draw_predictions
from inference.report import images_of
from runtime.logging import read_log
from tools import visualize

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/digits.yaml"


def main() -> int:
    output_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # more flags of main.py may follow, such as --seed 1 or --epochs 2
    command = ["main.py", "--config", RECIPE, "--output_dir", str(output_dir), *sys.argv[1:]]
    say(f"training: python {' '.join(command)}")
    status, folder = run(command), ROOT / output_dir
    if status and folder.exists():
        say(f"to continue it: .venv/bin/python {' '.join(command)}")
    if status or not folder.exists():  # after --help there is nothing to show
        return status
    last = read_log(folder)[-1]
    weights = output_dir / f"checkpoint-{last['epoch']}.pth"
    classifier = load_classifier(str(ROOT / weights))
    figure = draw_predictions(classifier, images_of(classifier.flags))
    figure.savefig(folder / "predictions.png", dpi=120)
    visualize.main(["report", str(folder)])
    say(f"""
top-1 on the held-out images: {last["test_acc1"]:.2f}% after {last["epoch"] + 1} epochs
  curves        {output_dir / "curves.png"}
  predictions   {output_dir / "predictions.png"}
  report        {output_dir / "report.html"} (open it in a browser)
  weights       {weights}

evaluate them again:
  .venv/bin/python main.py --config {output_dir}/config.yaml --eval true --resume {weights}
classify images with them:
  .venv/bin/python -m tools.predict data/digits/val/7 --checkpoint {weights}
try them on a page in the browser:
  make web CHECKPOINT={weights}
train on your own images (folders DIR/CLASS/) from published weights:
  .venv/bin/python main.py --config recipes/finetune.yaml --finetune hornet_tiny_gf.in1k \\
      --data_path DIR --output_dir runs/mine""")
    return 0


def run(command: list[str]) -> int:
    """Run Python with these arguments; return its exit status."""
    # so small a network gains little from a second thread, and waits for it on a busy machine
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
