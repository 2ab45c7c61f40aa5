"""Pictures of what a HorNet has learnt, as figures of matplotlib."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from inference import insight
from inference.classifier import Classifier
from models import HorNet, plain
from runtime.errors import UserError

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
                 (classifier.preprocessing.mean, classifier.preprocessing.std))  # fmt: skip
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
