"""Results of runs that differ in their seed only: mean, standard deviation, a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runtime.errors import UserError, reason_of
from runtime.logging import read_log

METRICS = {
    "top-1 (%)": "test_acc1",
    "mAP (%)": "test_mAP",
    "best (%)": "max_accuracy",
    "EMA top-1 (%)": "test_acc1_ema",
    "EMA mAP (%)": "test_mAP_ema",
    "best EMA (%)": "max_ema_accuracy",
}
"""Title of a column -> key of the last record in log.txt."""
OF_PLACES = frozenset(
    {"seed", "output_dir", "log_dir", "resume", "auto_resume", "exp_name", "project", "local_rank"}
    | {"world_size", "dist_url", "dist_on_itp", "dist_timeout", "num_workers", "pin_mem", "device"}
    | {"log_interval", "enable_wandb", "wandb_ckpt", "results_file", "real_labels"}
    | {f"save_ckpt{end}" for end in ("", "_freq", "_num", "_steps", "_minutes")}
)
"""Flags that say where and how long something is, not what is computed; and the seed."""


@dataclass(frozen=True)
class Run:
    """A run's folder, its flags without those OF_PLACES, and the last record of its log.txt."""

    folder: Path
    flags: dict[str, Any]
    seed: Any
    record: dict[str, Any]

    @property
    def lacks(self) -> str:
        """What is missing to the last epoch; '' if nothing is."""
        done, epochs = self.record["epoch"] + 1, self.flags.get("epochs")
        return f"{done} of {epochs}" if isinstance(epochs, int) and done < epochs else ""


@dataclass(frozen=True)
class Group:
    """Runs with the same flags; `flags` are those in which the groups differ."""

    flags: dict[str, Any]
    runs: list[Run]

    def values(self, key: str) -> list[float]:
        found = [run.record.get(key) for run in self.runs]
        return [value for value in found if isinstance(value, int | float)]


def read_run(folder: Path, defaults: dict[str, Any]) -> Run:
    """Read the folder of a run; UserError if it is none, or no epoch has finished.

    `defaults` are those of flags that the run did not have yet.
    """
    for name in ("config.yaml", "log.txt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no {name}")
    try:
        flags = yaml.safe_load((folder / "config.yaml").read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/config.yaml cannot be read: {reason_of(error)}") from None
    if not isinstance(flags, dict):
        raise UserError(f"{folder}/config.yaml has no flags")
    records = read_log(folder)
    if not records:
        raise UserError(f"{folder}: no epoch has finished yet")
    whole = defaults | flags
    compared = {name: value for name, value in whole.items() if name not in OF_PLACES}
    return Run(folder, compared, flags.get("seed"), records[-1])


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their flags and the epochs done, in the order of the first run of each."""
    # an unfinished run is not one of those that are averaged
    whole = [run.flags | ({"epochs": run.lacks} if run.lacks else {}) for run in runs]
    names = list(dict.fromkeys(name for flags in whole for name in flags))
    differ = [name for name in names if len({repr(flags.get(name)) for flags in whole}) > 1]
    groups: dict[str, Group] = {}
    for run, own in zip(runs, whole, strict=True):
        flags = {name: own.get(name) for name in differ}
        groups.setdefault(repr(flags), Group(flags, [])).runs.append(run)
    return list(groups.values())


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Return the rows of a table, the first of which are the titles."""
    used = {title: key for title, key in METRICS.items() if any(g.values(key) for g in groups)}
    rows = [[*groups[0].flags, "runs", *used]]
    for group in groups:
        cells = [_mean(group.values(key), len(group.runs)) for key in used.values()]
        rows.append([*map(str, group.flags.values()), str(len(group.runs)), *cells])
    return rows


def _mean(values: list[float], runs: int) -> str:
    """Return mean and standard deviation, and the number of values if some runs have none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        mean += f" ± {statistics.stdev(values):.2f}"
    return mean if len(values) == runs else f"{mean} (of {len(values)})"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def as_latex(rows: Sequence[Sequence[str]]) -> str:
    """Return a tabular with the rules of booktabs."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "±": r"$\pm$"}
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    lines = [
        " & ".join("".join(special.get(c, c) for c in cell) for cell in row) + r" \\"
        for row in rows
    ]
    return (
        "\n".join(
            [
                rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )
