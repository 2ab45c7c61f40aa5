"""Draws accuracy.svg, published accuracies over FLOPs: python docs/accuracy.py."""

import re
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
Points = list[tuple[float, float]]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def hornets(kind: str) -> Points:
    """Return GFLOPs and top-1 (%) of the README's table for '7x7' or 'GF'."""
    row = rf"\| HorNet-\w \({kind}\) \| `\S+in1k` .*\| ([\d.]+) G \| ([\d.]+) \|"
    return [(float(flops), float(top1)) for flops, top1 in re.findall(row, README)]


def peers(name: str) -> Points:
    """Return GFLOPs and top-1 (%) of the README's ImageNet row for 'Swin' or 'ConvNeXt'.

    They are those of table 1 in Liu et al., ConvNeXt (CVPR 2022).
    """
    (row,) = re.findall(rf"\| {name} (\|.* M, .*)", README)
    found = re.findall(r"\| ([\d.]+) \(\d+ M, ([\d.]+) G\)", row)
    return [(float(flops), float(top1)) for top1, flops in found]


def draw(file: Path) -> None:
    matplotlib.rcParams |= {"font.size": 11, "svg.hashsalt": "accuracy", "svg.fonttype": "path"}
    figure, axes = plt.subplots(figsize=(6.2, 3.9), layout="constrained")
    curves = {f"HorNet ({kind})": hornets(kind) for kind in ("GF", "7x7")}
    curves |= {name: peers(name) for name in ("Swin", "ConvNeXt")}
    colours = ("#c0392b", "#e59866", "#2e86c1", "#7f8c8d")
    for (name, points), colour, marker in zip(curves.items(), colours, "osD^", strict=True):
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, label=name)
    for size, (flops, top1) in zip("TSB", curves["HorNet (GF)"], strict=True):
        axes.annotate(size, (flops, top1), (0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="GFLOPs (multiply-adds), 224 x 224 pixels", ylabel="ImageNet-1K top-1 (%)",
             ylim=(81, 84.7))  # fmt: skip
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs/accuracy.svg")
