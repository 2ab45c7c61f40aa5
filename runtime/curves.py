"""Training curves from log.txt."""

from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.logging import read_log

PANELS = {
    "loss": {"train_loss": "training, as optimized", "test_loss": "test", "test_loss_ema": "EMA"},
    "top-1 (%)": {"train_class_acc": "training", "test_acc1": "test", "test_acc1_ema": "EMA"},
    "mAP (%)": {"test_mAP": "test", "test_mAP_ema": "EMA"},
    "learning rate": {"train_lr": "last layers", "train_min_lr": "first layers"},
}
"""Title of a panel -> key in log.txt -> label. Other panels than the loss are left out if they
have no values."""


def draw_curves(runs: list[Path]) -> Any:
    """Return a matplotlib Figure of the losses, accuracies and learning rates of runs.

    Raises:
        UserError: a folder has no log.txt, or no epoch has finished.
    """
    from matplotlib.figure import Figure

    logs, panels = _read(runs)
    figure = Figure(figsize=(4.3 * len(panels), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, title, logs)
    return figure


def draw_panels(runs: list[Path]) -> list[Any]:
    """Return the panels of `draw_curves` as Figures of their own, labelled by their titles."""
    from matplotlib.figure import Figure

    logs, panels = _read(runs)
    figures = []
    for title in panels:
        figure = Figure(figsize=(4.3, 4), layout="constrained")
        figure.set_label(title)
        _draw_panel(figure.subplots(), title, logs)
        figures.append(figure)
    return figures


def _read(runs: list[Path]) -> tuple[dict[Path, list[dict[str, Any]]], list[str]]:
    """Return the log of each run, and the titles of the panels that have values."""
    logs = {}
    for run in runs:
        if not (run / "log.txt").is_file():
            raise UserError(f"{run} is not the folder of a run: it has no log.txt")
        logs[run] = read_log(run)
    if not any(logs.values()):
        raise UserError(f"{', '.join(map(str, runs))}: no epoch has finished yet")
    records = [record for log in logs.values() for record in log]
    panels = [
        title
        for title, series in PANELS.items()
        if title == "loss"
        or any(record.get(key) is not None for record in records for key in series)
    ]
    return logs, panels


def _draw_panel(axes: Any, title: str, logs: dict[Path, list[dict[str, Any]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    names = {run: run.resolve().name for run in logs}
    if len(set(names.values())) < len(logs):
        names = {run: str(run.resolve()) for run in logs}
    for color, (run, log) in enumerate(logs.items()):
        for style, (key, label) in zip(("-", "--", ":"), PANELS[title].items(), strict=False):
            points = [(r["epoch"], r[key]) for r in log if r.get(key) is not None]
            if points:
                full = label if len(logs) == 1 else f"{names[run]}: {label}"
                axes.plot(*zip(*points, strict=True), style, marker=".", color=f"C{color}",
                          label=full)  # fmt: skip
    axes.set(title=title, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        for text in axes.legend(fontsize=7).get_texts():
            text.set_parse_math(False)


def save_curves(output_dir: Path) -> Path:
    """Draw a run's curves into curves.png in its folder."""
    path = output_dir / "curves.png"
    draw_curves([output_dir]).savefig(path, dpi=120)
    return path
