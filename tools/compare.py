"""Compares runs: mean and standard deviation over seeds, and the flags that differ.

python -m tools.compare runs/*
python -m tools.compare runs/* --latex

Runs whose flags differ in nothing but the seed, and in folders and the like, are one row.
"""

import sys
from argparse import Namespace
from pathlib import Path

from config.flags import Config
from runtime.comparison import as_latex, as_markdown, grouped, read_run, table
from runtime.errors import Parser, UserError, program


def parser() -> Parser:
    this = Parser("python -m tools.compare", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    add("--latex", action="store_true", help="a table in LaTeX (booktabs), instead of Markdown")
    return this


@program(parser)
def main(arguments: Namespace) -> None:
    """Print the table; on standard error, what is left out or makes runs less comparable."""
    runs, defaults = [], Config().flat()
    for folder in dict.fromkeys(arguments.runs):
        try:
            runs.append(read_run(folder, defaults))
        except UserError as error:
            if len(arguments.runs) == 1:
                raise
            sys.stderr.write(f"left out: {error}\n")
    if not runs:
        raise UserError("none of the folders is that of a run with a finished epoch")
    groups = grouped(runs)
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(map(str, seeds))) < len(seeds):
            names = ", ".join(str(run.folder) for run in group.runs)
            sys.stderr.write(f"{names}: some have the same seed\n")
    sys.stdout.write((as_latex if arguments.latex else as_markdown)(table(groups)))


if __name__ == "__main__":
    sys.exit(main())
