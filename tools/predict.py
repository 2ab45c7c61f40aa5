"""Classifies images by a trained classifier.

python -m tools.predict IMAGE... | FOLDER --checkpoint runs/mine/checkpoint-best.pth
"""

import csv
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from inference.classifier import Classifier, add_flags, classifier_of
from inference.labels import as_unicode, drawable, font_file
from inference.prediction import (
    COLUMNS,
    FORMATS,
    Prediction,
    predictions,
    rows_of,
    write_predictions,
)
from input_pipeline.arrays import as_picture
from input_pipeline.folders import find_images
from runtime.distributed import close_distributed, init_distributed
from runtime.errors import Parser, UserError, check_positive, program

CAPTION_WIDTH = 320  # pixels
FEW = 64  # images that are read without workers, whose start takes longer
SHOWN = 10  # unreadable images that are named, if there may be many
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
    add("--num-workers", "--num_workers", type=int,
        help="processes that read images; by default all cores, none for a few images")  # fmt: skip
    output = this.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    add_output = output.add_argument
    add_output("--output", type=Path, metavar="FILE",
               help="write FILE.csv or FILE.jsonl part by part, for any number of images; goes on "
               "after a stop, and torchrun -m tools.predict shares the images")  # fmt: skip
    add("--show-dir", type=Path, help="folder for the pictures with their classes")
    return this


def sorted_out(every: Iterable[tuple[Path, Prediction]]) -> tuple[Predictions, dict[Path, str]]:
    """Return the most probable classes of each file, and what is wrong with unreadable files."""
    found: Predictions = {}
    unreadable: dict[Path, str] = {}
    for file, own in every:
        if isinstance(own, str):
            unreadable[file] = own
        else:
            found[file] = own
    return found, unreadable


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
    writer.writerow(COLUMNS)
    for file, found in predictions.items():
        writer.writerows(rows_of(file, found))


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


def _workers(arguments: Namespace, count: int) -> int:
    if arguments.num_workers is None:
        return 0 if count < FEW else os.cpu_count() or 1
    return arguments.num_workers


def _command(arguments: Namespace) -> str:
    """Return what the predictions depend on, beside the files."""
    source = Path(arguments.checkpoint)
    state = source.stat() if source.is_file() else None
    changed = (state.st_size, state.st_mtime_ns) if state else ()
    return repr((str(source), changed, arguments.model, arguments.ema, arguments.input_size))


def _to_file(arguments: Namespace) -> int:
    output = arguments.output
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: give FILE{' or FILE'.join(FORMATS)}")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is not a folder")
    if arguments.show_dir:
        raise UserError("--show-dir needs a table, --json or --csv, not --output")
    context = init_distributed(arguments.device)
    files, classifier = find_images(arguments.images), classifier_of(arguments)
    workers = _workers(arguments, len(files))
    # that of this process stands for all of them
    own = -(-len(files) // context.world_size)
    with tqdm(total=own, unit="image", disable=None if context.is_main else True) as bar:
        unreadable = write_predictions(
            classifier, files, output, context, _command(arguments), arguments.topk,
            arguments.batch_size, workers, bar.update,
        )  # fmt: skip
    close_distributed()
    for reason in [*unreadable.values()][:SHOWN]:
        sys.stderr.write(f"skipped: {reason}\n")
    if len(unreadable) > SHOWN:
        sys.stderr.write(f"skipped: {len(unreadable) - SHOWN} more\n")
    return 0 if len(unreadable) < len(files) else 1


@program(parser)
def main(arguments: Namespace) -> int:
    check_positive(arguments, "topk", "batch_size")
    if arguments.num_workers is not None and arguments.num_workers < 0:
        raise UserError(f"--num-workers {arguments.num_workers}: at least 0")
    if arguments.output:
        return _to_file(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes need --output FILE.csv or FILE.jsonl")
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: this machine has no GPU")
    device = torch.device("cuda" if has_gpu and arguments.device != "cpu" else "cpu")
    files = find_images(arguments.images)
    classifier, topk, size = classifier_of(arguments), arguments.topk, arguments.batch_size
    workers = _workers(arguments, len(files))
    every = predictions(classifier, files, device, topk, size, workers)
    found, unreadable = sorted_out(every)
    if arguments.json:
        sys.stdout.write(as_json(found, unreadable))
    elif arguments.csv:
        print_csv(found)
    else:
        sys.stdout.write(as_table(found))
    for reason in unreadable.values():
        sys.stderr.write(f"skipped: {reason}\n")
    if arguments.show_dir:
        save_captioned(found, arguments.show_dir, classifier)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
