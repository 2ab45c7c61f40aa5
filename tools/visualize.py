"""Pictures of what a HorNet has learnt, and one HTML page about a run.

python -m tools.visualize curves runs/a runs/b --output curves.png
python -m tools.visualize field my_images --checkpoint runs/a/checkpoint-best.pth --output field.png
python -m tools.visualize filters --checkpoint hornet_tiny_gf.in1k --output filters.png
python -m tools.visualize gates image.jpg --checkpoint hornet_tiny_gf.in1k --output gates.png
python -m tools.visualize cam my_images --checkpoint runs/a/checkpoint-best.pth --output cam.png
python -m tools.visualize confusion my_images --checkpoint runs/a/checkpoint-best.pth --output c.png
python -m tools.visualize report runs/a
"""

import argparse
import base64
import html
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from checkpoints.run_folder import resumable
from config import AugmentConfig, DataConfig
from datasets import FOLDERS, build_data
from input_pipeline.image_sets import ImageSet
from input_pipeline.images import find_images, load_image
from models import HorNet, plain
from runtime.curves import draw_curves
from runtime.errors import UserError, check_positive, run_program
from runtime.files import written_whole
from runtime.logging import read_log
from tools import insight
from tools.classifier import Classifier, add_flags, load_classifier

MOST_COUNTED = 2000
"""Images whose classes a report counts; of more, as many evenly out of them."""


CAM_ALPHA = 0.45
"""How much of a picture of where the network looks is colour."""


@dataclass(frozen=True)
class Examples:
    """Images as a network takes them, beside what people see of them."""

    inputs: Tensor
    """(N, 3, S, S), normalised."""
    pixels: np.ndarray
    """(N, S, S, 3), between 0 and 1."""
    truth: Tensor | None
    """(N,) labels, where the files lie in folders of the classes' names."""


def examples_of(classifier: Classifier, files: list[Path]) -> Examples:
    inputs = classifier.inputs(files)
    mean, std = (torch.tensor(values)[:, None, None] for values in
                 (classifier.view.mean, classifier.view.std))  # fmt: skip
    pixels = (inputs * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return Examples(inputs, pixels, classifier.truth(files))


def draw_field(classifier: Classifier, examples: Examples) -> Figure:
    """The effective receptive field of the middle of the deepest stage."""
    field = insight.effective_receptive_field(hornet(classifier), examples.inputs)
    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.subplots()
    # the logarithm shows what is far away
    picture = axes.imshow(field.clamp(min=1e-4).log10().numpy(), cmap="viridis", vmin=-4, vmax=0)
    figure.colorbar(picture, label="log10 of the gradient, of its largest")
    half, most = (insight.width_of_field(field, share) for share in (0.5, 0.9))
    axes.set_title(
        f"half of the gradient in a square of {half} pixels, 90 % in {most}, of {len(field)}",
        fontsize=8,
    )
    axes.set_axis_off()
    return figure


def draw_filters(classifier: Classifier, columns: int = 8) -> Figure:
    """The first channels' global filters in the first layer of each stage that has them."""
    found = insight.global_filters(hornet(classifier))
    if not found:
        name = classifier.config.model
        raise UserError(f"{name} has no global filters: its depthwise convolutions are local")
    first = {name.rsplit(".", 3)[0]: name for name in reversed(found)}
    figure = Figure(figsize=(1.1 * columns, 2.7 * len(first)), layout="constrained")
    grid = figure.subplots(2 * len(first), columns, squeeze=False)
    for row, name in enumerate(reversed(first.values())):
        for kind, maps in enumerate(found[name]):
            for axes, values in zip(grid[2 * row + kind], maps, strict=False):
                limit = float(values.abs().max())
                low = 0.0 if kind == 0 else -limit
                axes.imshow(values.numpy(), cmap=("magma", "RdBu")[kind], vmin=low, vmax=limit)
            what = ("frequency, zero in the middle", "space, no shift in the middle")[kind]
            shown = f"the first {min(columns, len(maps))} of {len(maps)} channels"
            grid[2 * row + kind, 0].set_title(f"{name}: {what}; {shown}", fontsize=8, loc="left")
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def draw_gates(classifier: Classifier, examples: Examples) -> Figure:
    """What each order of the last gnConv of each stage gates with, on the first image.

    Stages whose map is a single pixel, as of small images, tell no places apart and are left out.
    """
    found = insight.gate_maps(hornet(classifier), examples.inputs[:1])
    maps = {name: gates for name, gates in found.items() if gates[0].numel() > 1} or found
    columns = 1 + max(map(len, maps.values()))
    figure = Figure(figsize=(1.6 * columns, 1.8 * len(maps)), layout="constrained")
    grid = figure.subplots(len(maps), columns, squeeze=False)
    for row, (name, orders) in zip(grid, maps.items(), strict=True):
        row[0].imshow(examples.pixels[0])
        row[0].set_title(name, fontsize=8)
        for k, (axes, gate) in enumerate(zip(row[1:], orders, strict=False)):
            axes.imshow(gate[0].numpy(), cmap="viridis")
            axes.set_title(rf"$f_{k}(q_{k})\,/\,\alpha$", fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def draw_cam(classifier: Classifier, examples: Examples, columns: int = 4) -> Figure:
    """Grad-CAM of the predicted class on each image, and the true class where it is another."""
    network = hornet(classifier)
    maps = torch.cat([insight.grad_cam(network, image) for image in examples.inputs.split(1)])
    with torch.no_grad():
        shares = network(examples.inputs).softmax(1)
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(2 * columns, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    names = classifier.labels
    for index, (axes, share) in enumerate(zip(grid.flat, shares, strict=False)):
        axes.imshow(examples.pixels[index])
        axes.imshow(maps[index].numpy(), cmap="jet", alpha=CAM_ALPHA, vmin=0, vmax=1)
        found = int(share.argmax())
        title = f"{names[found][:24]} {share.max():.0%}"
        if examples.truth is not None and examples.truth[index] != found:
            title += f"\n(true {names[examples.truth[index]][:24]})"
        if not maps[index].any():
            title += "\n(nothing there speaks for it)"
        axes.set_title(title, fontsize=8, parse_math=False)
    return figure


def draw_confusion(classifier: Classifier, files: list[Path], most: int = 8) -> Figure:
    """The confusion matrix of images in folders of the classes' names, and the worst confusions.

    Raises:
        UserError: a folder is not named as a class.
    """
    names, truth = classifier.labels, classifier.truth(files)
    if truth is None:
        known = classifier.folders
        alien = next(file for file in files if file.parent.name not in known)
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise UserError(f"{alien}: its folder is none of the model's classes ({some})")
    with torch.no_grad():
        parts = [files[start : start + 64] for start in range(0, len(files), 64)]
        logits = torch.cat([classifier.model(classifier.inputs(part)) for part in parts])
    shares = logits.softmax(1)
    found = shares.argmax(1)
    present = torch.cat((truth, found)).unique()  # of thousands of classes those that occur
    places = torch.searchsorted(present, truth), torch.searchsorted(present, found)
    counts = torch.zeros(len(present), len(present), dtype=torch.long)
    counts.index_put_(places, torch.ones_like(truth), accumulate=True)
    ticks = [names[label] for label in present.tolist()]
    accuracy = float((truth == found).float().mean())
    wrong = (truth != found).nonzero().flatten()
    worst = sorted(wrong.tolist(), key=lambda index: -float(shares[index].max()))[:most]

    figure = Figure(figsize=(7, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 1))  # type: ignore[misc]
    axes = top.subplots()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(
        title=f"accuracy {accuracy:.2%} of {len(files)} images", xlabel="predicted", ylabel="true"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    if len(ticks) <= 30:
        axes.set_xticks(range(len(ticks)), ticks, rotation=90, parse_math=False)
        axes.set_yticks(range(len(ticks)), ticks, parse_math=False)
        for row, column in counts.nonzero().tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center",
                      color=colour, fontsize=7)  # fmt: skip
    if worst:
        bottom.suptitle("the surest mistakes", fontsize=9)
        examples = examples_of(classifier, [files[index] for index in worst])
        row = bottom.subplots(1, most, squeeze=False)[0]
        for axes in row:
            axes.set_axis_off()
        for axes, pixels, index in zip(row, examples.pixels, worst, strict=False):
            axes.imshow(pixels)
            guess, right = (names[labels[index]][:14] for labels in (found, truth))
            title = f"{guess} {shares[index].max():.0%}\n(true {right})"
            axes.set_title(title, fontsize=7, parse_math=False)
    return figure


def hornet(classifier: Classifier) -> nn.Module:
    """The network of a classifier, plain, to be looked into; UserError for other than a HorNet."""
    if not isinstance(classifier.model, HorNet):
        raise UserError(f"{classifier.config.model} is no HorNet in PyTorch, to be looked into")
    return plain(classifier.model)


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
        "pixels": classifier.view.input_size,
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


def spread(files: list[Path], count: int) -> list[Path]:
    """Files evenly out of the list, so that sorted folders all have a part."""
    return [files[i * len(files) // min(count, len(files))] for i in range(min(count, len(files)))]


def as_png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode()


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.visualize", description="Pictures of what a HorNet has learnt."
    )
    what = this.add_subparsers(dest="what", required=True, metavar="WHAT")
    helps = {
        "curves": "training curves of one or several runs",
        "field": "effective receptive field of the deepest stage",
        "filters": "learned global filters, in frequency and in space",
        "gates": "what each order of a gnConv gates with, on one image",
        "cam": "where the network looks: Grad-CAM",
        "confusion": "confusion matrix of images in class folders, and the worst confusions",
        "report": "one HTML page about a run",
    }
    for name, text in helps.items():
        sub = what.add_parser(name, help=text, description=text)
        if name == "curves":
            sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
        elif name == "report":
            sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
            sub.add_argument("--checkpoint", help="another than the run's best, or newest")
            sub.add_argument("--images", type=Path, metavar="FOLDER",
                             help="class folders (the run's own to evaluate on)")  # fmt: skip
        else:
            if name != "filters":
                sub.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders")
            add_flags(sub)
        if name not in ("curves", "filters", "confusion", "gates"):
            sub.add_argument("--count", type=int, default=8, help="how many images (8)")
        default = "FILE.html (RUN/report.html)" if name == "report" else "FILE.png"
        sub.add_argument("--output", type=Path, required=name != "report", help=default)
    return this


def draw(arguments: argparse.Namespace) -> Figure:
    """The picture that was asked for."""
    if arguments.what == "curves":
        return draw_curves(arguments.runs)
    classifier = load_classifier(
        arguments.checkpoint,
        arguments.model,
        arguments.ema,
        arguments.input_size,
        takes_exported=arguments.what == "confusion",
    )
    if arguments.what == "filters":
        return draw_filters(classifier)
    files = find_images(arguments.images)
    if arguments.what == "confusion":
        return draw_confusion(classifier, files)
    count = 1 if arguments.what == "gates" else arguments.count
    examples = examples_of(classifier, spread(files, count))
    of = {"field": draw_field, "gates": draw_gates, "cam": draw_cam}
    try:
        return of[arguments.what](classifier, examples)
    except ValueError as error:  # of the network, about the size
        raise UserError(f"--input-size {classifier.view.input_size}: {error}") from None


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.visualize", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    check_positive(arguments, *({"input_size", "count"} & vars(arguments).keys()))
    if arguments.what == "report" and not arguments.run.is_dir():
        raise UserError(f"{arguments.run} is no folder of a run")
    output = arguments.output or arguments.run / "report.html"
    suffix = ".html" if arguments.what == "report" else ".png"
    if output.suffix != suffix:
        raise UserError(f"--output {output}: give FILE{suffix}")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is no folder")
    if arguments.what == "report":
        text = report(arguments.run, arguments.checkpoint, arguments.images, arguments.count)
        with written_whole(output) as written:
            written.write_text(text)
    else:
        figure = draw(arguments)
        with written_whole(output) as written:
            figure.savefig(written, dpi=130)
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
