"""Trains a small detector or segmentor on drawn shapes, and shows what it has learnt.

python -m tools.demo_dense detection
python -m tools.demo_dense segmentation
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from dense.shapes import write_coco, write_masks
from tools.demo import ROOT, run, say

AP50 = {"box AP50": "coco/bbox_mAP_50", "mask AP50": "coco/segm_mAP_50"}
MIOU = {"mIoU, per cent": "mIoU"}
TASKS = {
    "detection": ("object_detection", "mask_rcnn_shapes.py", write_coco, AP50),
    "segmentation": ("semantic_segmentation", "upernet_shapes.py", write_masks, MIOU),
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m tools.demo_dense", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    arguments, more = parser.parse_known_args()  # such as --cfg-options randomness.seed=1
    package, config, write, metrics = TASKS[arguments.task]
    config = f"{package}/configs/demo/{config}"

    data = ROOT / f"data/shapes-{arguments.task}"
    shutil.rmtree(data, ignore_errors=True)  # it may be incomplete
    write(data / "train", 400, seed=0, size=128)
    write(data / "val", 80, seed=1, size=128)

    folder = Path("runs") / time.strftime(f"{arguments.task}-%Y%m%d-%H%M%S")
    train = ["-m", f"{package}.train", config, "--work-dir", str(folder), *more]
    say(f"training: python {' '.join(train)}")
    if run(train):
        return 1
    weights = folder / (ROOT / folder / "last_checkpoint").read_text().rpartition("/")[2]
    test = ["-m", f"{package}.test", config, str(weights), "--work-dir", str(folder / "test")]
    shown = folder / "shown"
    if run([*test, "--show-dir", str(shown)]):
        return 1

    (results,) = (ROOT / folder / "test").glob("*/*.json")
    found = json.loads(results.read_text())
    values = ", ".join(f"{name} {found[key]:g}" for name, key in metrics.items())
    pictures = [to_tensor(Image.open(file)) for file in sorted((ROOT / shown).iterdir())[:12]]
    save_image(pictures, ROOT / folder / "predictions.png", nrow=3, padding=8, pad_value=1)
    say(f"""
on {len(list((data / "val/images").iterdir()))} held-out images: {values}
  pictures      {folder / "predictions.png"} (truth on the left, predictions on the right)
  log, config   {folder}
  weights       {weights}

test them again:
  .venv/bin/python {" ".join(test)}
predict for other images:
  .venv/bin/python -m {package}.predict {config} {weights} IMAGES --show-dir {folder / "others"}
the same in a web page:
  make web CHECKPOINT={weights} CONFIG={config}
train on your own data: copy {package}/configs/finetune""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
