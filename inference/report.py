"""One HTML page about a run, with all its pictures inside."""

import base64
import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from checkpoints.run_folder import resumable
from config.flags import AugmentConfig, DataConfig
from datasets import FOLDERS, build_data
from inference import pictures
from inference.classifier import load_classifier
from inference.labels import drawable, printable
from input_pipeline.folders import find_images
from input_pipeline.image_sets import ImageSet
from input_pipeline.images import readable_files
from runtime.curves import draw_curves
from runtime.errors import UserError
from runtime.logging import read_log
from runtime.sizes import size_text
from utils import count_parameters

MOST_COUNTED = 2000  # images that a report classifies, spread evenly over all
STYLE = (
    "body{font:16px system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}th{text-align:left;padding-right:2rem;font-weight:500}"
)


def report(run: Path, source: str | None, images: Path | None, count: int) -> str:
    """Return the page; UserError if `run` is not the folder of a run, or its images are not found.

    `source` is the checkpoint, by default the best or the newest; `images` a folder of class
    folders, by default the run's evaluation images; `count` of them are drawn one by one.
    """
    run = run.resolve()
    curves = draw_curves([run])
    best = run / "checkpoint-best.pth"
    found = [best] if best.is_file() else resumable(run)
    if not source and not found:
        raise UserError(f"{run} has no checkpoint")
    source = source or str(found[0])
    classifier = load_classifier(source, takes_exported=False)
    flags = classifier.flags
    every = find_images([str(images)]) if images else images_of(flags)
    files = readable_files(pictures.spread(every, MOST_COUNTED), classifier.preprocessing.decoding)
    examples = pictures.examples_of(classifier, pictures.spread(files, count))
    log = read_log(run)
    metric = ("mAP", "test_mAP") if classifier.multi_label else ("top-1", "test_acc1")
    measured = [record[metric[1]] for record in log if record.get(metric[1]) is not None]
    facts = {
        "model": classifier.config.model,
        "checkpoint": Path(source).name,
        "parameters": f"{count_parameters(classifier.model) / 1e6:.1f} M",
        "epochs": log[-1]["epoch"] + 1,
        f"best {metric[0]}": f"{max(measured):.2f} %" if measured else "not measured",
        "images": f"{len(files)} of the {len(every)} of {images or flags['data_path']}",
        "pixels": size_text(classifier.preprocessing.input_size),
    }
    sections = (
        _section("Training", "Losses and accuracies after each epoch.", lambda: curves),
        _section("Confusions", "How often images of the class on the left were classified as the "
                 "class below.", pictures.draw_confusion, classifier, files),
        _section("Where it looks (Grad-CAM)", "The redder, the more evidence for the predicted "
                 "class.", pictures.draw_cam, classifier, examples),
        _section("What each order gates with", "Mean magnitude of the gates of the last gnConv of "
                 "each stage, by order: the brighter, the more passes.",
                 pictures.draw_gates, classifier, examples),
        _section("Effective receptive field", "How much each pixel changes the centre of the "
                 "deepest map with a useful resolution.",
                 pictures.draw_field, classifier, examples),
        _section("Global filters", "Those of the first layer of each stage, in frequency, and in "
                 "space as a circular convolution.", pictures.draw_filters, classifier),
    )  # fmt: skip
    names = classifier.labels
    shown = dict(zip(drawable(names), names, strict=True))
    by_number = {drawn: name for drawn, name in shown.items() if drawn != printable(name)}
    numbered = f"<h2>Classes that pictures number</h2>{_table(by_number)}" if by_number else ""
    name = _text(run.name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        f"<style>{STYLE}</style><h1>{name}</h1>{_table(facts)}{''.join(sections)}{numbered}"
        f"<details><summary>All flags</summary>{_table(flags)}</details></html>\n"
    )


def _section(title: str, text: str, draw: Callable[..., Figure], *arguments: Any) -> str:
    data = io.BytesIO()
    try:
        draw(*arguments).savefig(data, format="png", dpi=110)
    except UserError as error:  # this model or its images don't have this picture
        body = f"<p>{_text(error)}</p>"
    else:
        png = base64.b64encode(data.getvalue()).decode()
        body = f'<img alt="{title}" src="data:image/png;base64,{png}">'
    return f"<h2>{title}</h2><p>{text}</p>{body}"


def _text(value: Any) -> str:
    return escape(printable(str(value)))


def _table(facts: dict[str, Any]) -> str:
    rows = (f"<tr><th>{_text(k)}<td>{_text(v)}" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def images_of(flags: dict[str, Any]) -> list[Path]:
    """Return a run's evaluation images; UserError if they are not in folders, or gone."""
    try:
        data_set, path = str(flags.get("data_set", "IMNET")), str(flags.get("data_path"))
        if data_set not in (*FOLDERS, "multi_label"):
            raise UserError("they are in no folder")
        most = flags.get("max_images")
        folder = flags.get("eval_data_path") if data_set == "image_folder" else None
        config = DataConfig(
            # digits would be written again
            data_set="image_folder" if data_set in FOLDERS else data_set,
            data_path=path,
            eval_data_path=folder and str(folder),
            val_fraction=float(flags.get("val_fraction", 0.0)),
            val_choice="hash" if flags.get("val_choice") == "hash" else "draw",
            max_images=None if most is None else max(1, int(most)),
        )
        data = build_data(config, AugmentConfig(), input_size=32, with_train=False)
    except (UserError, OSError, TypeError, ValueError) as error:
        raise UserError(f"the run's images: {error}; give --images FOLDER") from None
    assert isinstance(data.val, ImageSet)
    return [Path(data.val.name(index)) for index in range(len(data.val))]
