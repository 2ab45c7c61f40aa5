"""Classifies images by a trained classifier.

python -m tools.predict IMAGE... | FOLDER --checkpoint runs/mine/checkpoint-best.pth
"""

import csv
import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
from PIL import ImageDraw, ImageFont, ImageOps

from inference.classifier import Classifier, add_flags, classifier_of
from inference.labels import as_unicode, drawable, font_file
from input_pipeline.arrays import as_picture
from input_pipeline.folders import find_images
from runtime.errors import Parser, UserError, check_positive, program
from runtime.sizes import size_text

CAPTION_WIDTH = 320  # pixels
Predictions = dict[Path, list[tuple[str, float]]]
"""The most probable classes of each file, with their probabilities."""


def parser() -> Parser:
    this = Parser("python -m tools.predict", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add_flags(this)
    add("--topk", type=int, default=5, help="classes per image (5)")
    add("--batch-size", type=int, default=32, help="images at a time (32)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    output = this.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    add("--show-dir", type=Path, help="folder for the pictures with their classes")
    return this


@torch.inference_mode()
def predict(
    classifier: Classifier, files: list[Path], device: torch.device, topk: int, batch_size: int
) -> tuple[Predictions, dict[Path, str]]:
    """Return the most probable classes of each file, and what is wrong with unreadable files."""
    model, names = classifier.model.to(device), classifier.labels
    view = classifier.preprocessing
    predictions: Predictions = {}
    unreadable: dict[Path, str] = {}
    for start in range(0, len(files), batch_size):
        batch: dict[Path, torch.Tensor] = {}
        for file in files[start : start + batch_size]:
            try:
                batch[file] = view.transform(view.load(file))
            except UserError as error:
                unreadable[file] = str(error)
        if not batch:
            continue
        images = torch.stack(list(batch.values()))
        try:
            probabilities = classifier.probabilities(model(images.to(device)).float())
        except (ValueError, RuntimeError, AssertionError) as error:
            size = size_text(view.input_size)
            raise UserError(f"--input-size {size}: the model fails: {error}") from None
        values, labels = probabilities.topk(min(topk, len(names)))
        for file, shares, found in zip(batch, values.tolist(), labels.tolist(), strict=True):
            predictions[file] = [(names[i], p) for i, p in zip(found, shares, strict=True)]
    return predictions, unreadable


def as_table(predictions: Predictions) -> str:
    width = max((len(str(file)) for file in predictions), default=0)
    return "".join(
        f"{file!s:{width}}  " + "  ".join(f"{share:6.1%} {name}" for name, share in found) + "\n"
        for file, found in predictions.items()
    )


def as_json(predictions: Predictions, unreadable: dict[Path, str]) -> str:
    images = [
        {
            "image": as_unicode(file),
            "predictions": [{"class": as_unicode(c), "probability": p} for c, p in found],
        }
        for file, found in predictions.items()
    ]
    problems = [
        {"image": as_unicode(file), "reason": as_unicode(reason)}
        for file, reason in unreadable.items()
    ]
    return json.dumps({"images": images, "unreadable": problems}, indent=2) + "\n"


def print_csv(predictions: Predictions) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "probability"))
    for file, found in predictions.items():
        for rank, (name, share) in enumerate(found, start=1):
            writer.writerow((file, rank, name, f"{share:.4f}"))


def save_captioned(predictions: Predictions, folder: Path, classifier: Classifier) -> None:
    """Save each image with its classes below it as folder/<number>-<name>.png."""
    font = ImageFont.truetype(str(font_file()), 14)
    names = dict(zip(classifier.labels, drawable(classifier.labels), strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (file, found) in enumerate(predictions.items()):
            image = as_picture(classifier.preprocessing.load(file))
            height = max(1, round(CAPTION_WIDTH / image.width * image.height))
            image = image.resize((CAPTION_WIDTH, height))
            picture = ImageOps.expand(image, (0, 0, 0, 18 * len(found) + 8), "white")
            caption = "\n".join(f"{share:6.1%}  {names[name]}" for name, share in found)
            ImageDraw.Draw(picture).text((6, height + 4), caption, "black", font)
            picture.save(folder / f"{number:04d}-{file.stem}.png")
    except OSError as error:
        raise UserError(f"--show-dir {folder} cannot be written: {error}") from None


@program(parser)
def main(arguments: Namespace) -> int:
    check_positive(arguments, "topk", "batch_size")
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: this machine has no GPU")
    device = torch.device("cuda" if has_gpu and arguments.device != "cpu" else "cpu")
    files = find_images(arguments.images)
    classifier, topk, size = classifier_of(arguments), arguments.topk, arguments.batch_size
    predictions, unreadable = predict(classifier, files, device, topk, size)
    if arguments.json:
        sys.stdout.write(as_json(predictions, unreadable))
    elif arguments.csv:
        print_csv(predictions)
    else:
        sys.stdout.write(as_table(predictions))
    for reason in unreadable.values():
        sys.stderr.write(f"skipped: {reason}\n")
    if arguments.show_dir:
        save_captioned(predictions, arguments.show_dir, classifier)
    return 0 if predictions else 1


if __name__ == "__main__":
    sys.exit(main())
