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
import sys
from pathlib import Path

from matplotlib.figure import Figure

from inference.classifier import add_flags, load_classifier
from inference.pictures import (
    draw_cam,
    draw_confusion,
    draw_field,
    draw_filters,
    draw_gates,
    examples_of,
)
from inference.report import report, spread
from input_pipeline.images import find_images
from runtime.curves import draw_curves
from runtime.errors import UserError, check_positive, run_program
from runtime.files import written_whole


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
        raise UserError(f"--input-size {classifier.preprocessing.input_size}: {error}") from None


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
