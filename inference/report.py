"""One HTML page about a run, with all its pictures inside."""

import base64
import csv
import io
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from matplotlib.figure import Figure

from checkpoints.run_folder import resumable
from config.flags import AugmentConfig, Config, DataConfig
from datasets import FOLDERS, build_data
from inference import pictures
from inference.classifier import load_classifier
from inference.labels import drawable, printable
from input_pipeline.folders import find_images
from input_pipeline.image_sets import ImageSet
from input_pipeline.images import readable_files
from runtime.curves import draw_panels
from runtime.errors import UserError
from runtime.logging import TIMING_FILE, read_log
from runtime.sizes import size_text
from utils import count_parameters

MOST_COUNTED = 2000  # images that a report classifies, spread evenly over all
PAGE = Template("""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width,initial-scale=1">
<title>$name</title>
<style>
:root{color-scheme:light dark;
  --page:#f4f5f7;--card:#fff;--text:#1b1f24;--soft:#5b6470;--line:#dfe3e8;--link:#0b5cad}
@media(prefers-color-scheme:dark){
  :root{--page:#121417;--card:#1c1f24;--text:#e6e8eb;--soft:#9aa4b0;--line:#343a41;--link:#7fb8ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:70rem;padding:1.5rem clamp(.75rem,3vw,2rem) 3rem;
  background:var(--page);color:var(--text);font:1rem/1.5 system-ui,sans-serif;
  overflow-wrap:anywhere}
h1{margin:0;font-size:1.75rem;line-height:1.2}
h2{margin:0;font-size:1.2rem}
p{margin:.25rem 0 0;color:var(--soft)}
a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.75rem 0 1.25rem}
section{margin-top:1rem;padding:1.25rem clamp(.75rem,3vw,1.5rem);background:var(--card);
  border:1px solid var(--line);border-radius:.75rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(13rem,100%),1fr));
  gap:1rem 1.5rem;margin:0}
dt{color:var(--soft);font-size:.875rem;white-space:nowrap}
dd{margin:0;font-weight:600}
@media(max-width:30rem){dl{gap:.4rem}
  dl div{display:flex;justify-content:space-between;gap:1rem}dd{text-align:right}}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(18rem,100%),1fr));
  justify-items:center;gap:1rem;margin-top:1rem}
/* the pictures are drawn on white, which a dark page keeps as a card */
.pictures img{display:block;max-width:100%;height:auto;padding:.5rem;background:#fff;
  border-radius:.5rem}
.scroll{overflow-x:auto;margin-top:.75rem}
table{border-collapse:collapse;font-size:.875rem}
th,td{padding:.35rem 1rem .35rem 0;text-align:left;vertical-align:top;
  border-bottom:1px solid var(--line)}
th{font-weight:500;white-space:nowrap}
td{min-width:6rem}
td:last-child{padding-right:0}
thead th{color:var(--soft)}
details{margin-top:1rem}
summary{cursor:pointer;color:var(--link)}
</style>
</head>
<body>
<header><h1>$name</h1><nav>$contents</nav></header>
<main><section><dl>$facts</dl></section>
$sections</main>
</body>
</html>
""")


def report(run: Path, source: str | None, images: Path | None, count: int) -> str:
    """Return the page; UserError if `run` is not the folder of a run, or its images are not found.

    `source` is the checkpoint, by default the best or the newest; `images` a folder of class
    folders, by default the run's evaluation images; `count` of them are drawn one by one.
    """
    run = run.resolve()
    curves = draw_panels([run])
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
    facts = {
        "model": classifier.config.model,
        "checkpoint": Path(source).name,
        "parameters": f"{count_parameters(classifier.model) / 1e6:.1f} M",
        "epochs": log[-1]["epoch"] + 1,
        **_best(log, classifier.multi_label),
        "images": f"{len(files)} of the {len(every)} of {images or flags['data_path']}",
        "pixels": size_text(classifier.preprocessing.input_size),
        **_timing(run, log),
    }
    download = _csv_link(f"{run.name}-log.csv", log)
    sections = [
        _drawn("Training", f"Losses, accuracies and learning rates by epoch. {download}",
               lambda: curves),
        _drawn("Confusions", "How often images of the class on the left were classified as the "
               "class below.", pictures.draw_confusion, classifier, files),
        _drawn("Where it looks (Grad-CAM)", "The redder, the more evidence for the predicted "
               "class.", pictures.draw_cam, classifier, examples),
        _drawn("What each order gates with", "Mean magnitude of the gates of the last gnConv of "
               "each stage, by order: the brighter, the more passes.",
               pictures.draw_gates, classifier, examples),
        _drawn("Effective receptive field", "How much each pixel changes the centre of the "
               "deepest map with a useful resolution.",
               pictures.draw_field, classifier, examples),
        _drawn("Global filters", "Those of the first layer of each stage, in frequency, and in "
               "space as a circular convolution.", pictures.draw_filters, classifier),
        *_numbered_classes(classifier.labels),
        ("Flags", _flags(flags)),
    ]  # fmt: skip
    return PAGE.substitute(
        name=_text(run.name),
        contents=" ".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in sections),
        facts="".join(f"<div><dt>{_text(k)}<dd>{_text(v)}</div>" for k, v in facts.items()),
        sections="".join(
            f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>\n'
            for title, body in sections
        ),
    )


def _best(log: list[dict[str, Any]], multi_label: bool) -> dict[str, str]:
    """Return the best accuracy, with its name."""
    name, key = ("mAP", "test_mAP") if multi_label else ("top-1", "test_acc1")
    measured = _numbers(log, key)
    return {f"best {name}": f"{max(measured):.2f} %" if measured else "not measured"}


def _timing(run: Path, log: list[dict[str, Any]]) -> dict[str, str]:
    """Return hardware, time and speed, as far as the run has recorded them."""
    if not (run / TIMING_FILE).is_file():
        return {}
    epochs = {record["epoch"] for record in log}
    speeds: dict[str, list[float]] = {}  # of each hardware: a run may be resumed on another one
    seconds = 0.0
    for record in read_log(run, TIMING_FILE):
        if record["epoch"] in epochs:
            several = "es" * (record["processes"] != 1)
            hardware = f"{record['device']}, {record['processes']} process{several}"
            speeds.setdefault(hardware, []).extend(_numbers([record], "train_images_per_s"))
            seconds += record["seconds"]
    if not speeds:
        return {}
    whole = sum(map(len, speeds.values()))  # epochs without a stop in between
    least = "" if whole == len(log) else "at least "
    told = "; ".join(f"{median(values):,.1f} in training" for values in speeds.values() if values)
    facts = {
        "hardware": "; ".join(speeds),
        "time": f"{least}{timedelta(seconds=round(seconds))}",
    }
    return facts | ({"images per second": told} if told else {})


def _numbers(records: list[dict[str, Any]], key: str) -> list[float]:
    values = [record.get(key) for record in records]
    return [value for value in values if isinstance(value, int | float)]


def _csv_link(name: str, log: list[dict[str, Any]]) -> str:
    """Return a link that downloads the log; a column of it may begin in a later epoch."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for record in log for key in record)))
    writer.writeheader()
    writer.writerows(log)
    data = base64.b64encode(file.getvalue().encode("utf-8", "backslashreplace")).decode()
    address = f"data:text/csv;charset=utf-8;base64,{data}"
    return f'<a download="{_text(name)}" href="{address}">Download the log (CSV)</a>'


def _drawn(
    title: str, text: str, draw: Callable[..., Figure | list[Figure]], *arguments: Any
) -> tuple[str, str]:
    """Return a section of pictures: its title, and its HTML with `text` above them."""
    try:
        drawn = draw(*arguments)
    except UserError as error:  # this model or its images don't have this picture
        return title, f"<p>{text}</p><p>{_text(error)}</p>"
    figures = drawn if isinstance(drawn, list) else [drawn]
    images = "".join(_picture(figure, title) for figure in figures)
    return title, f"<p>{text}</p><div class=pictures>{images}</div>"


def _picture(figure: Figure, title: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    png = base64.b64encode(data.getvalue()).decode()
    name = _text(figure.get_label() or title)
    return f'<img alt="{name}" src="data:image/png;base64,{png}">'


def _numbered_classes(names: list[str]) -> list[tuple[str, str]]:
    """Return the section of classes whose names the pictures' font lacks, if there are any."""
    shown = dict(zip(drawable(names), names, strict=True))
    by_number = [(drawn, name) for drawn, name in shown.items() if drawn != printable(name)]
    return [("Classes that pictures number", _table(by_number))] if by_number else []


def _flags(flags: dict[str, Any]) -> str:
    """Return the table of flags that differ from their defaults, and one of all."""
    if not flags:
        return "<p>The checkpoint has none.</p>"
    defaults = Config().flat()
    changed = [
        (name, value, defaults.get(name, ""))
        for name, value in flags.items()
        if name not in defaults or repr(value) != repr(defaults[name])
    ]
    return (
        "<p>Those that differ from their defaults.</p>"
        f"{_table(changed, ('flag', 'value', 'default'))}"
        f"<details><summary>All flags</summary>{_table(list(flags.items()))}</details>"
    )


def _text(value: Any) -> str:
    return escape(printable(str(value)))


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _table(rows: Sequence[tuple[Any, ...]], titles: tuple[str, ...] = ()) -> str:
    head = f"<thead><tr>{''.join(f'<th>{title}' for title in titles)}" if titles else ""
    lines = (
        f"<tr><th>{_text(name)}{''.join(f'<td>{_text(value)}' for value in values)}"
        for name, *values in rows
    )
    return f"<div class=scroll><table>{head}<tbody>{''.join(lines)}</table></div>"


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
