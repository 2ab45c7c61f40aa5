"""Pictures of what a classifier has learnt, as figures of matplotlib."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure, FigureBase
from torch import Tensor, nn

from inference import insight
from inference.classifier import Classifier
from inference.labels import drawable
from input_pipeline.arrays import as_picture, rgb_of
from models import HorNet, plain
from runtime.errors import UserError
from runtime.sizes import as_size, size_text

CAM_ALPHA = 0.45  # opacity of the heat map over an image


@dataclass(frozen=True)
class Examples:
    inputs: Tensor  # (N, 3, H, W), normalised
    pixels: np.ndarray  # (N, H, W, 3) in [0, 1], for people
    truth: Tensor | None  # (N,) labels, if the files are in class folders


def examples_of(classifier: Classifier, files: list[Path]) -> Examples:
    inputs, view = classifier.inputs(files), classifier.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
    pixels = rgb_of(inputs * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return Examples(inputs, pixels, classifier.truth(files))


def hornet(classifier: Classifier) -> nn.Module:
    """Return the plain network of a classifier; UserError if it is not a HorNet."""
    if not isinstance(classifier.model, HorNet):
        raise UserError(f"{classifier.config.model} is not a HorNet in PyTorch: it can't be drawn")
    return plain(classifier.model)


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes, (rows, columns), each of width x height inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, _blank(figure, rows, columns)


def _blank(figure: FigureBase, rows: int, columns: int) -> np.ndarray:
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return grid


@torch.no_grad()
def _probabilities(classifier: Classifier, files: list[Path]) -> Tensor:
    parts = [files[start : start + 64] for start in range(0, len(files), 64)]
    logits = torch.cat([classifier.model(classifier.inputs(part)) for part in parts])
    return classifier.probabilities(logits)


def draw_field(classifier: Classifier, examples: Examples) -> Figure:
    """Draw the effective receptive field of the centre of the deepest map."""
    field = insight.effective_receptive_field(hornet(classifier), examples.inputs)
    figure, [[axes]] = _grid(1, 1, 4.4, 4)
    # the logarithm shows what is far away
    picture = axes.imshow(field.clamp(min=1e-4).log10().numpy(), vmin=-4, vmax=0)
    figure.colorbar(picture, label="log10 of the gradient, of its largest")
    half, most = (insight.width_of_field(field, share) for share in (0.5, 0.9))
    of = size_text(as_size(field.shape))
    title = f"half of the gradient in a square of {half} pixels, 90 % in {most}, of {of}"
    axes.set_title(title, fontsize=8)
    return figure


def draw_filters(classifier: Classifier, columns: int = 8) -> Figure:
    """Draw global filters of the first channels, in the first layer of each stage with filters."""
    found = insight.global_filters(hornet(classifier))
    if not found:
        name = classifier.config.model
        raise UserError(f"{name} has no global filters: its depthwise convolutions are local")
    first = {name.rsplit(".", 3)[0]: name for name in reversed(found)}
    figure, grid = _grid(2 * len(first), columns, 1.1, 1.35)
    for row, name in enumerate(reversed(first.values())):
        for kind, maps in enumerate(found[name]):
            for axes, values in zip(grid[2 * row + kind], maps, strict=False):
                limit = float(values.abs().max())
                low = 0.0 if kind == 0 else -limit
                axes.imshow(values.numpy(), cmap=("magma", "RdBu")[kind], vmin=low, vmax=limit)
            what = ("frequency, zero in the middle", "space, no shift in the middle")[kind]
            shown = f"the first {min(columns, len(maps))} of {len(maps)} channels"
            grid[2 * row + kind, 0].set_title(f"{name}: {what}; {shown}", fontsize=8, loc="left")
    return figure


def draw_gates(classifier: Classifier, examples: Examples) -> Figure:
    """Draw the gates of each order of the last gnConv of each stage, on the first image."""
    found = insight.gate_maps(hornet(classifier), examples.inputs[:1])
    # a map of a single pixel shows nothing
    maps = {name: gates for name, gates in found.items() if gates[0].numel() > 1} or found
    figure, grid = _grid(len(maps), 1 + max(map(len, maps.values())), 1.6, 1.8)
    for row, (name, orders) in zip(grid, maps.items(), strict=True):
        row[0].imshow(examples.pixels[0])
        row[0].set_title(name, fontsize=8)
        for k, (axes, gate) in enumerate(zip(row[1:], orders, strict=False)):
            axes.imshow(gate[0].numpy())
            axes.set_title(rf"$f_{k}(q_{k})\,/\,\alpha$", fontsize=8)
    return figure


def draw_cam(classifier: Classifier, examples: Examples, columns: int = 4) -> Figure:
    """Draw Grad-CAM of the predicted class on each image; titles name the true class of errors."""
    network, names = hornet(classifier), drawable(classifier.labels)
    maps = torch.cat([insight.grad_cam(network, image) for image in examples.inputs.split(1)])
    with torch.no_grad():
        shares = classifier.probabilities(network(examples.inputs))
    figure, grid = _grid(-(-len(maps) // columns), columns, 2, 2.3)
    for index, (axes, share) in enumerate(zip(grid.flat, shares, strict=False)):
        axes.imshow(examples.pixels[index])
        axes.imshow(maps[index].numpy(), cmap="jet", alpha=CAM_ALPHA, vmin=0, vmax=1)
        found = int(share.argmax())
        title = f"{names[found][:24]} {share.max():.0%}"
        if examples.truth is not None and examples.truth[index] != found:
            title += f"\n(true {names[examples.truth[index]][:24]})"
        if not maps[index].any():
            title += "\n(no evidence for it)"
        axes.set_title(title, fontsize=8, parse_math=False)
    return figure


def draw_predictions(classifier: Classifier, files: list[Path]) -> Figure:
    """Draw images in class folders with their predicted and true class, mistakes first, in red."""
    truth, names = _truth(classifier, files).tolist(), drawable(classifier.labels)
    found = _probabilities(classifier, files).argmax(1).tolist()
    wrong = [i for i, label in enumerate(truth) if found[i] != label]
    right = [i for i, label in enumerate(truth) if found[i] == label]
    figure, grid = _grid(5, 10, 1.1, 1.35)
    # the files are sorted by class: an even spread shows every class
    shown = wrong + spread(right, grid.size - len(wrong))
    for axes, index in zip(grid.flat, shown, strict=False):
        axes.imshow(as_picture(classifier.preprocessing.load(files[index])))
        title = f"{names[found[index]]} (true {names[truth[index]]})"
        colour = "red" if index in wrong else "black"
        axes.set_title(title, color=colour, fontsize=8, parse_math=False)
    figure.suptitle(f"{len(wrong)} mistakes in {len(files)} test images")
    return figure


def draw_confusion(classifier: Classifier, files: list[Path], most: int = 8) -> Figure:
    """Draw a confusion matrix and the most confident mistakes; UserError for unknown classes."""
    names, truth = drawable(classifier.labels), _truth(classifier, files)
    shares, found = _probabilities(classifier, files).max(1)
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 1))  # type: ignore[misc]
    _draw_matrix(top, names, truth, found)
    wrong = (truth != found).nonzero().flatten()
    worst = wrong[shares[wrong].argsort(descending=True, stable=True)][:most].tolist()
    if worst:
        bottom.suptitle("the most confident mistakes", fontsize=9)
        pixels = examples_of(classifier, [files[index] for index in worst]).pixels
        for axes, image, index in zip(_blank(bottom, 1, most)[0], pixels, worst, strict=False):
            axes.imshow(image)
            guess, right = (names[labels[index]][:14] for labels in (found, truth))
            title = f"{guess} {shares[index]:.0%}\n(true {right})"
            axes.set_title(title, fontsize=7, parse_math=False)
    return figure


def _truth(classifier: Classifier, files: list[Path]) -> Tensor:
    truth, known = classifier.truth(files), classifier.folders
    if classifier.multi_label:
        raise UserError("confusions and mistakes need a network that gives each image one class")
    if truth is None:
        unknown = next(file for file in files if file.parent.name not in known)
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise UserError(f"{unknown}: its folder is not one of the model's classes ({some})")
    return truth


def _draw_matrix(figure: FigureBase, names: list[str], truth: Tensor, found: Tensor) -> None:
    # there may be thousands of other classes
    present, (rows, columns) = torch.stack((truth, found)).unique(return_inverse=True)
    size = len(present)
    counts = (rows * size + columns).bincount(minlength=size**2).view(size, size)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    accuracy = float((truth == found).float().mean())
    axes.set(title=f"accuracy {accuracy:.2%} of {len(truth)} images", xlabel="predicted",
             ylabel="true", xticks=[], yticks=[])  # fmt: skip
    if len(present) <= 30:
        ticks = [names[label] for label in present.tolist()]
        axes.set_xticks(range(len(ticks)), ticks, rotation=90, parse_math=False)
        axes.set_yticks(range(len(ticks)), ticks, parse_math=False)
        for row, column in counts.nonzero().tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center",
                      color=colour, fontsize=7)  # fmt: skip


def spread(values: list[Any], count: int) -> list[Any]:
    """Return at most `count` values, spread evenly over the list."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]
