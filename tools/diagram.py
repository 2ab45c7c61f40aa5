"""Draws the block of a HorNet, and the gnConv in it, with the widths of a real layer.

python -m tools.diagram docs/block.svg --channels 64 --order 3
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from checkpoints.files import written_whole
from models import GnConv
from runtime.errors import UserError
from tools import program

COLOURS = {"pointwise": "#cfe2f3", "mixing": "#fce5cd", "norm": "#eeeeee", "scale": "#d9ead3"}
GAP, HEIGHT = 0.45, 0.8


class Drawing:
    """Boxes, circles and arrows on axes whose units are about the height of a box."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        axes.set_aspect("equal")
        axes.set_axis_off()

    def box(self, x: float, y: float, text: str, kind: str, width: float) -> float:
        """A box with its left side at x and its middle at y; returns where its right side is."""
        corner = (x, y - HEIGHT / 2)
        self.axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, boxstyle="round,pad=0,"
            "rounding_size=0.12", facecolor=COLOURS[kind], edgecolor="black", lw=0.8))  # fmt: skip
        self.axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)
        return x + width

    def circle(self, x: float, y: float, text: str) -> float:
        """A circle with its left side at x; returns where its right side is."""
        radius = 0.24
        centre = (x + radius, y)
        self.axes.add_patch(Circle(centre, radius, facecolor="white", edgecolor="black", lw=0.8))
        self.axes.text(*centre, text, ha="center", va="center_baseline", fontsize=9)
        return x + 2 * radius

    def line(self, *points: tuple[float, float], head: bool = True) -> None:
        """Straight from point to point, with an arrow's head at the last."""
        self.axes.plot(*zip(*points[:-1], strict=True), color="black", lw=0.8)
        self.axes.update_datalim(points[-1:])
        self.axes.annotate("", points[-1], points[-2], arrowprops={
            "arrowstyle": "-|>" if head else "-", "lw": 0.8, "color": "black",
            "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8})  # fmt: skip

    def label(self, x: float, y: float, text: str) -> None:
        self.axes.text(x, y, text, ha="center", va="bottom", fontsize=8)


def draw_block(drawing: Drawing) -> None:
    """x + gamma1 gnConv(norm(x)), then x + gamma2 MLP(norm(x))."""
    x, y = 0.0, 0.0
    drawing.label(x + 0.2, y + 0.1, "$x$")
    drawing.line((x, y), (x + GAP, y), head=False)
    x += GAP
    branches = ("gnConv", "mixing", 1.6), ("MLP, 4 C wide", "pointwise", 2.3)
    for number, (name, kind, width) in enumerate(branches, start=1):
        start = x
        gamma = (rf"$\gamma_{number}$", "scale", 0.7)
        for box in (("norm", "norm", 1.3), (name, kind, width), gamma):
            drawing.line((x, y), (x + GAP, y))
            x = drawing.box(x + GAP, y, *box)
        drawing.line((x, y), (x + GAP, y))
        above = y + 0.9
        middle = x + GAP + 0.24
        drawing.line((start, y), (start, above), (middle, above), (middle, y + 0.24))
        x = drawing.circle(x + GAP, y, "+")
        if number < len(branches):
            drawing.line((x, y), (x + GAP, y), head=False)
            x += GAP
    drawing.line((x, y), (x + 0.8, y))


def draw_gnconv(drawing: Drawing, layer: GnConv) -> None:
    """The recursion of a layer, with the widths that it computes at."""
    narrow, total, last = layer.dims[0], sum(layer.dims), len(layer.dims) - 1
    upper, lower = 1.9, 0.0
    drawing.label(0.25, lower + 0.1, f"$x$\n{layer.proj_in.in_channels}")
    drawing.line((0, lower), (0.7, lower))
    widths = f"{layer.proj_in.in_channels} → {narrow + total}"
    x = drawing.box(0.7, lower, f"proj_in\n{widths}", "pointwise", 1.9)
    start = x
    drawing.line((start - 0.95, lower + HEIGHT / 2), (start - 0.95, upper), (start + 1.2, upper))
    drawing.label(start - 0.2, upper + 0.1, f"$q$: {total}")
    drawing.line((start, lower), (start + 1.6, lower))
    drawing.label(start + 0.75, lower + 0.1, f"$p_0$: {narrow}")
    x = start + 1.6
    for k, width in enumerate(layer.dims):
        middle = x + 0.24
        drawing.line((middle, upper - HEIGHT / 2), (middle, lower + 0.24))
        drawing.axes.text(middle + 0.1, (upper + lower) / 2, f"$q_{k}$: {width}", va="center",
                          fontsize=8)  # fmt: skip
        x = drawing.circle(x, lower, "×")
        drawing.line((x, lower), (x + 1.3, lower))
        drawing.label(x + 0.65, lower + 0.1, f"$p_{k + 1}$: {width}")
        x += 1.3
        if k < last:
            widths = f"{width} → {layer.dims[k + 1]}"
            x = drawing.box(x, lower, f"$g_{k + 1}$\n{widths}", "pointwise", 1.5)
            drawing.line((x, lower), (x + GAP, lower))
            x += GAP
    out = layer.proj_out.out_channels
    what = f"depthwise: 7x7, or 3x3 beside the global filter, on all {total}, times $s$"
    drawing.box(start + 1.2, upper, what, "mixing", x - start - 1.5)
    x = drawing.box(x, lower, f"proj_out\n{layer.dims[-1]} → {out}", "pointwise", 1.9)
    drawing.line((x, lower), (x + 0.8, lower))
    drawing.label(x + 0.45, lower + 0.1, f"$y$\n{out}")


def draw(layer: GnConv) -> Figure:
    """The block, and below it the recursion of its gnConv."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.6))
    draw_block(Drawing(top))
    draw_gnconv(Drawing(bottom), layer)
    for axes, title in (
        (top, "block"),
        (bottom, f"gnConv of order {layer.order}, with its widths"),
    ):
        axes.autoscale_view()
        axes.set_title(title, fontsize=9, loc="left")
    return figure


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser("python -m tools.diagram", description="Draws HorNet's block.")
    this.add_argument("output", type=Path, metavar="FILE", help=".svg, .png or .pdf")
    this.add_argument("--channels", type=int, default=64, help="of the gnConv (64)")
    this.add_argument("--order", type=int, default=3, help="of the gnConv (3)")
    return this


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return program.run("tools.diagram", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.output.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise UserError(f"{arguments.output}: give FILE.svg, FILE.png or FILE.pdf")
    try:
        figure = draw(GnConv(arguments.channels, order=arguments.order, device="meta"))
    except ValueError as error:
        raise UserError(str(error)) from None
    # words stay words, and two drawings of the same are the same file
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "hornet"}
    with written_whole(arguments.output) as written, matplotlib.rc_context(settings):
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(written, dpi=150, metadata=dates.get(written.suffix))
    sys.stdout.write(f"{arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
