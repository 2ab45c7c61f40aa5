"""Compares runs: mean and standard deviation over seeds, and the flags that differ.

python -m tools.compare runs/*
python -m tools.compare runs/* --latex

Runs whose flags differ in nothing but the seed, and in folders and the like, are one row.
"""

import sys
from argparse import Namespace
from pathlib import Path

from runtime.comparison import as_latex, as_markdown, grouped, read_run, table
from runtime.errors import Parser, program


def parser() -> Parser:
    this = Parser("python -m tools.compare", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    add("--latex", action="store_true", help="a table in LaTeX (booktabs), instead of Markdown")
    return this


@program(parser)
def main(arguments: Namespace) -> None:
    """Print the table; on standard error, what makes runs less comparable."""
    groups = grouped([read_run(folder) for folder in dict.fromkeys(arguments.runs)])
    for group in groups:
        for run in filter(lambda run: run.lacks, group.runs):
            sys.stderr.write(f"{run.folder}: {run.lacks}\n")
        seeds = [run.seed for run in group.runs]
        if len(set(map(str, seeds))) < len(seeds):
            names = ", ".join(str(run.folder) for run in group.runs)
            sys.stderr.write(f"{names}: some have the same seed\n")
    sys.stdout.write((as_latex if arguments.latex else as_markdown)(table(groups)))


if __name__ == "__main__":
    sys.exit(main())
