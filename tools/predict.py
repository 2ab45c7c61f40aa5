"""Classifies images by a trained classifier.

python -m tools.predict IMAGE... | FOLDER --checkpoint runs/mine/checkpoint-best.pth
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from inference.classifier import Classifier, add_flags, classifier_of
from inference.exported import Exported
from inference.labels import as_unicode, drawable, font_file
from inference.prediction import (
    COLUMNS,
    EXACT,
    FEATURE_FORMATS,
    FORMATS,
    Prediction,
    csv_lines,
    lower_precision,
    predictions,
    write_predictions,
)
from input_pipeline.arrays import as_picture
from input_pipeline.folders import find_images
from runtime.distributed import close_distributed, init_distributed, of_main
from runtime.errors import Parser, UserError, check_positive, program
from utils import cpu_cores

CAPTION_WIDTH = 320  # pixels
FEW = 64  # images that are read without workers, whose start takes longer
SHOWN = 10  # unreadable images that are named, if there may be many


def parser() -> Parser:
    this = Parser("python -m tools.predict", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add_flags(this)
    add("--topk", type=int, default=5, help="classes per image (5)")
    add("--batch-size", type=int, default=32, help="images at a time (32)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="of autocast; auto is float16 on a GPU, if the probabilities of eight images differ "
        f"by less than {EXACT} and there are no --features, else float32")  # fmt: skip
    add("--num-workers", "--num_workers", type=int,
        help="processes that read images; by default all cores, none for a few images")  # fmt: skip
    output = this.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    add_output = output.add_argument
    add_output("--output", type=Path, metavar="FILE",
               help="write FILE.csv or FILE.jsonl part by part, for any number of images; goes on "
               "after a stop, and torchrun -m tools.predict shares the images")  # fmt: skip
    add("--features", type=Path, metavar="FILE",
        help="write the input of the head, a row of float32 for each image, into FILE.npy or "
        "FILE.safetensors, as --output; FILE.npy.images.csv names the images")  # fmt: skip
    add("--show-dir", type=Path, help="folder for the pictures with their classes")
    return this


def as_table(found: list[Prediction]) -> str:
    width = max((len(str(one.file)) for one in found), default=0)
    return "".join(
        f"{one.file!s:{width}}  "
        + "  ".join(f"{share:6.1%} {name}" for name, share in one.classes)
        + "\n"
        for one in found
    )


def as_json(found: list[Prediction], unreadable: list[Prediction]) -> str:
    images = [
        {
            "image": as_unicode(one.file),
            "predictions": [{"class": as_unicode(c), "probability": p} for c, p in one.classes],
        }
        for one in found
    ]
    problems = [
        {"image": as_unicode(one.file), "reason": as_unicode(one.problem)} for one in unreadable
    ]
    return json.dumps({"images": images, "unreadable": problems}, indent=2) + "\n"


def print_csv(found: list[Prediction]) -> None:
    sys.stdout.write(",".join(COLUMNS) + "\n")
    sys.stdout.writelines(map(csv_lines, found))


def save_captioned(found: list[Prediction], folder: Path, classifier: Classifier) -> None:
    """Save each image with its classes below it as <number>-<name>.png in an existing folder."""
    font = ImageFont.truetype(str(font_file()), 14)
    names = dict(zip(classifier.labels, drawable(classifier.labels), strict=True))
    with _writing(folder):
        for number, one in enumerate(found):
            image = as_picture(classifier.preprocessing.load(one.file))
            height = max(1, round(CAPTION_WIDTH / image.width * image.height))
            image = image.resize((CAPTION_WIDTH, height))
            picture = ImageOps.expand(image, (0, 0, 0, 18 * len(one.classes) + 8), "white")
            caption = "\n".join(f"{share:6.1%}  {names[name]}" for name, share in one.classes)
            ImageDraw.Draw(picture).text((6, height + 4), caption, "black", font)
            picture.save(folder / f"{number:04d}-{one.file.stem}.png")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the error of a file that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--show-dir {folder} cannot be written: {error}") from None


def _workers(arguments: Namespace, count: int) -> int:
    if arguments.num_workers is None:
        return 0 if count < FEW else cpu_cores()
    return arguments.num_workers


def _command(arguments: Namespace, precision: torch.dtype | None) -> str:
    """Return what the predictions depend on, beside the files."""
    source = Path(arguments.checkpoint)
    state = source.stat() if source.is_file() else None
    changed = (state.st_size, state.st_mtime_ns) if state else ()
    names = ("model", "ema", "input_size", "topk", "output", "features")
    return repr((str(source), changed, precision, [getattr(arguments, name) for name in names]))


def _check_outputs(arguments: Namespace) -> None:
    for flag, formats in (("output", FORMATS), ("features", FEATURE_FORMATS)):
        path = getattr(arguments, flag)
        if path and path.suffix not in formats:
            raise UserError(f"--{flag} {path}: give FILE{' or FILE'.join(formats)}")
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"--{flag} {path}: {path.parent} is not a folder")
    if arguments.show_dir:
        raise UserError("--show-dir needs a table, --json or --csv, not --output or --features")
    if arguments.json or arguments.csv:
        raise UserError("--features goes with --output FILE, not with --json or --csv")


def _check_exported(arguments: Namespace, classifier: Classifier) -> None:
    """Refuse flags that need a checkpoint."""
    if isinstance(classifier.model, Exported):
        if arguments.dtype != "auto":
            raise UserError("--dtype needs a checkpoint: an exported file has its own")
        if arguments.features:
            raise UserError("--features needs a checkpoint: an exported file has only logits")


def _precision(
    arguments: Namespace, classifier: Classifier, files: list[Path], device: torch.device
) -> torch.dtype | None:
    """Return the dtype of autocast, None for float32, and tell of it if it was chosen here."""
    if arguments.dtype != "auto":
        return None if arguments.dtype == "float32" else getattr(torch, arguments.dtype)
    if device.type == "cpu" or isinstance(classifier.model, Exported) or arguments.features:
        return None
    precision = lower_precision(classifier, files, device)
    sys.stderr.write(f"computing in {'float16' if precision else 'float32'} (--dtype)\n")
    return precision


def _to_file(arguments: Namespace) -> int:
    _check_outputs(arguments)
    context = init_distributed(arguments.device)
    files, classifier = find_images(arguments.images), classifier_of(arguments)
    _check_exported(arguments, classifier)
    precision = of_main(lambda: _precision(arguments, classifier, files, context.device), context)
    predict = partial(
        predictions,
        classifier,
        device=context.device,
        topk=arguments.topk,
        batch_size=arguments.batch_size,
        num_workers=_workers(arguments, len(files)),
        precision=precision,
        with_features=arguments.features is not None,
    )
    # that of this process stands for all of them
    own = -(-len(files) // context.world_size)
    with tqdm(total=own, unit="image", disable=None if context.is_main else True) as bar:
        unreadable = write_predictions(
            predict, files, arguments.output, arguments.features, context,
            _command(arguments, precision), bar.update,
        )  # fmt: skip
    close_distributed()
    if context.is_main and len(unreadable) < len(files):
        for path in filter(None, (arguments.output, arguments.features)):
            sys.stdout.write(f"{len(files) - len(unreadable)} images in {path}\n")
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
    if arguments.output or arguments.features:
        return _to_file(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes need --output FILE.csv or FILE.jsonl, or --features")
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: this machine has no GPU")
    device = torch.device("cuda" if has_gpu and arguments.device != "cpu" else "cpu")
    files = find_images(arguments.images)
    classifier, topk, size = classifier_of(arguments), arguments.topk, arguments.batch_size
    workers = _workers(arguments, len(files))
    _check_exported(arguments, classifier)
    precision = _precision(arguments, classifier, files, device)
    if arguments.show_dir:
        with _writing(arguments.show_dir):  # before computing for nothing
            arguments.show_dir.mkdir(parents=True, exist_ok=True)
    found: list[Prediction] = []
    unreadable: list[Prediction] = []
    for one in predictions(classifier, files, device, topk, size, workers, precision):
        (unreadable if one.problem else found).append(one)
    if arguments.json:
        sys.stdout.write(as_json(found, unreadable))
    elif arguments.csv:
        print_csv(found)
    else:
        sys.stdout.write(as_table(found))
    for one in unreadable:
        sys.stderr.write(f"skipped: {one.problem}\n")
    if arguments.show_dir:
        save_captioned(found, arguments.show_dir, classifier)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
