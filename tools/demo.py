"""Trains a small HorNet on handwritten digits through main.py, and shows what it has learnt.

python -m tools.demo
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from checkpoints.fitting import load_exactly
from checkpoints.reading import read_checkpoint, weights_in
from config.command_line import parse_args
from datasets import build_data
from input_pipeline.image_sets import FolderImages
from runtime.logging import read_log
from tools import visualize
from training.build import build_model

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/digits.yaml"


def main() -> int:
    output_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # more flags of main.py may follow, such as --seed 1 or --epochs 2
    command = ["main.py", "--config", RECIPE, "--output_dir", str(output_dir), *sys.argv[1:]]
    say(f"training: python {' '.join(command)}")
    # so small a network gains little from a second thread, and waits for it on a busy machine
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    trained = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment)
    folder = ROOT / output_dir
    if trained.returncode and folder.exists():
        say(f"go on with it: .venv/bin/python {' '.join(command)}")
    if trained.returncode or not folder.exists():  # after --help there is nothing to show
        return trained.returncode
    pictures = draw_predictions(folder)
    page = folder / "report.html"
    visualize.main(["report", str(folder)])
    last = read_log(folder)[-1]
    weights = output_dir / f"checkpoint-{last['epoch']}.pth"
    say(f"""
top-1 on the held-out images: {last["test_acc1"]:.2f}% after {last["epoch"] + 1} epochs
  curves        {output_dir / "curves.png"}
  predictions   {pictures.relative_to(ROOT)}
  report        {page.relative_to(ROOT)} (open it in a browser)
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


def draw_predictions(folder: Path, columns: int = 10, rows: int = 5) -> Path:
    """predictions.png: test images with predicted and true class, the mistakes first, in red."""
    from matplotlib.figure import Figure

    config = parse_args(["--config", str(folder / "config.yaml")])
    data = build_data(config.data, config.augment, config.model.input_size, with_train=False)
    assert isinstance(data.val, FolderImages)
    labels = data.val.labels or []
    path = folder / f"checkpoint-{config.schedule.epochs - 1}.pth"
    model = build_model(config.model, len(data.classes))
    load_exactly(model, weights_in(read_checkpoint(path), path), path)
    model.eval()
    with torch.inference_mode():
        batches = DataLoader(data.val, batch_size=64)
        predicted = torch.cat([model(images).argmax(1) for images, _ in batches]).tolist()
    wrong = [i for i, label in enumerate(labels) if predicted[i] != label]
    right = [i for i, label in enumerate(labels) if predicted[i] == label]
    # images are sorted by class: an even spread shows every class
    room = min(max(0, columns * rows - len(wrong)), len(right))
    shown = (wrong + [right[i * len(right) // room] for i in range(room)])[: columns * rows]

    figure = Figure(figsize=(1.1 * columns, 1.35 * rows), layout="constrained")
    for axes, index in zip(figure.subplots(rows, columns).flat, shown, strict=False):
        image, label = data.val.read(index)
        axes.imshow(image)
        colour = "black" if predicted[index] == label else "red"
        title = f"{data.classes[predicted[index]]} (true {data.classes[label]})"
        axes.set_title(title, color=colour, fontsize=8)
    for axes in figure.axes:
        axes.axis("off")
    figure.suptitle(f"{len(wrong)} mistakes in {len(predicted)} test images")
    figure.savefig(folder / "predictions.png", dpi=120)
    return folder / "predictions.png"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
