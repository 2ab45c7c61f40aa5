"""Draws accuracy.svg, published accuracies over FLOPs: python docs/accuracy.py."""

import re
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
Points = list[tuple[float, float]]
PEERS: dict[str, Points] = {
    # Liu et al., Swin Transformer (ICCV 2021), table 1; ConvNeXt (CVPR 2022), table 1
    "Swin": [(4.5, 81.3), (8.7, 83.0), (15.4, 83.5)],
    "ConvNeXt": [(4.5, 82.1), (8.7, 83.1), (15.4, 83.8)],
}
"""GFLOPs and top-1 (%) at 224 pixels, trained on ImageNet-1K alone."""


def hornets(kind: str) -> Points:
    """Return the points of the README's table for '7x7' or 'GF'."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(rf"\| HorNet-\w \({kind}\) \| `\S+in1k` .*\| ([\d.]+) G \| ([\d.]+) \|", text)
    return [(float(flops), float(top1)) for flops, top1 in rows]


def draw(file: Path) -> None:
    matplotlib.rcParams |= {"font.size": 11, "svg.hashsalt": "accuracy", "svg.fonttype": "path"}
    figure, axes = plt.subplots(figsize=(6.2, 3.9), layout="constrained")
    curves = {"HorNet (GF)": hornets("GF"), "HorNet (7x7)": hornets("7x7"), **PEERS}
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
