"""One HTML page about a run, with all its pictures inside."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from checkpoints.run_folder import resumable
from config import AugmentConfig, DataConfig
from datasets import FOLDERS, build_data
from inference.classifier import load_classifier
from inference.pictures import (
    draw_cam,
    draw_confusion,
    draw_field,
    draw_filters,
    draw_gates,
    examples_of,
)
from input_pipeline.image_sets import ImageSet
from input_pipeline.images import find_images, load_image
from runtime.curves import draw_curves
from runtime.errors import UserError
from runtime.logging import read_log

MOST_COUNTED = 2000
"""Images whose classes a report counts; of more, as many evenly out of them."""

EXPLANATIONS = {
    "Training": "Losses and accuracies after each epoch.",
    "Confusions": "How often images of the class at the left were taken for the class below.",
    "Where it looks (Grad-CAM)": "The redder, the more speaks for the predicted class.",
    "What each order gates with": "The mean magnitude of what the recursion of the last gnConv of "
    "each stage multiplies in, order by order: the brighter, the more passes.",
    "Effective receptive field": "How much each pixel moves the middle of the deepest map that "
    "tells places apart.",
    "Global filters": "What the first layer of each stage has learnt to let through (frequency), "
    "and the same as a circular convolution (space).",
}


def report(run: Path, source: str | None, images: Path | None, count: int) -> str:
    """One HTML page about a run, with all its pictures inside.

    Args:
        run: Its folder.
        source: The checkpoint to look into; if not given the best one, or the newest.
        images: Folder of class folders; if not given the run's own to evaluate on.
        count: How many images are looked at one by one.

    Raises:
        UserError: the folder is none of a run, or its images are not found.
    """
    run = run.resolve()
    curves = draw_curves([run])
    best = run / "checkpoint-best.pth"
    found = [best] if best.is_file() else resumable(run)
    if not source and not found:
        raise UserError(f"{run} holds no checkpoint")
    source = source or str(found[0])
    classifier = load_classifier(source, takes_exported=False)
    flags = classifier.flags
    every = find_images([str(images)]) if images else images_of(flags)
    files = [file for file in spread(every, MOST_COUNTED) if _is_readable(file)]
    if not files:
        raise UserError(f"{images or flags['data_path']}: none of its images can be read")
    examples = examples_of(classifier, spread(files, count))
    log = read_log(run)
    measured = [record["test_acc1"] for record in log if record.get("test_acc1") is not None]
    parameters = sum(p.numel() for p in classifier.model.parameters())
    facts = {
        "model": classifier.config.model, "checkpoint": Path(source).name,
        "parameters": f"{parameters / 1e6:.1f} M", "epochs": log[-1]["epoch"] + 1,
        "best top-1": f"{max(measured):.2f} %" if measured else "not measured",
        "images": f"{len(files)} of the {len(every)} of {images or flags['data_path']}",
        "pixels": classifier.preprocessing.input_size,
    }  # fmt: skip
    pictures: dict[str, Callable[[], Figure]] = {
        "Training": lambda: curves,
        "Confusions": lambda: draw_confusion(classifier, files),
        "Where it looks (Grad-CAM)": lambda: draw_cam(classifier, examples),
        "What each order gates with": lambda: draw_gates(classifier, examples),
        "Effective receptive field": lambda: draw_field(classifier, examples),
        "Global filters": lambda: draw_filters(classifier),
    }
    parts = []
    for title, draw in pictures.items():
        try:
            body = f'<img alt="{title}" src="data:image/png;base64,{as_png(draw())}">'
        except UserError as error:  # of this model or its images there is no such picture
            body = f"<p>{html.escape(str(error))}</p>"
        parts.append(f"<h2>{title}</h2><p>{EXPLANATIONS[title]}</p>{body}")
    rows, flat = (
        "".join(f"<tr><th>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in table.items())
        for table in (facts, flags)
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.name)}</title>"
        "<style>body{font:16px system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}th{text-align:left;padding-right:2rem;font-weight:500}</style>"
        f"<h1>{html.escape(run.name)}</h1><table>{rows}</table>{''.join(parts)}"
        f"<details><summary>All flags</summary><table>{flat}</table></details></html>\n"
    )


def images_of(flags: dict[str, Any]) -> list[Path]:
    """A run's images to evaluate on; raises UserError where they are in no folder, or gone."""
    try:
        data_set, path = str(flags.get("data_set", "IMNET")), str(flags.get("data_path"))
        if data_set not in FOLDERS:
            raise UserError("they are in no folder")
        share, most = flags.get("val_fraction", 0.0), flags.get("max_images")
        of_own = flags.get("eval_data_path") if data_set == "image_folder" else None
        config = DataConfig(
            data_set="image_folder",  # digits would be written anew
            data_path=path, eval_data_path=of_own and str(of_own), val_fraction=float(share),
            max_images=None if most is None else max(1, int(most)),
        )  # fmt: skip
        data = build_data(config, AugmentConfig(), input_size=32, with_train=False)
    except (UserError, OSError, TypeError, ValueError) as error:
        raise UserError(f"the run's images: {error}; give --images FOLDER") from None
    assert isinstance(data.val, ImageSet)
    return [Path(data.val.name(index)) for index in range(len(data.val))]


def _is_readable(file: Path) -> bool:
    try:
        load_image(str(file))
    except UserError:
        return False
    return True


def as_png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode()


def spread(files: list[Path], count: int) -> list[Path]:
    """Files evenly out of the list, so that sorted folders all have a part."""
    return [files[i * len(files) // min(count, len(files))] for i in range(min(count, len(files)))]
