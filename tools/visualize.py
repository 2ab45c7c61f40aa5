"""Draws what a HorNet has learnt.

python -m tools.visualize curves runs/a runs/b --output curves.png
python -m tools.visualize field my_images --checkpoint runs/a/checkpoint-best.pth --output field.png
python -m tools.visualize filters --checkpoint hornet_tiny_gf.in1k --output filters.png
python -m tools.visualize gates image.jpg --checkpoint hornet_tiny_gf.in1k --output gates.png
python -m tools.visualize cam my_images --checkpoint runs/a/checkpoint-best.pth --output cam.png
python -m tools.visualize confusion my_images --checkpoint runs/a/checkpoint-best.pth --output c.png
python -m tools.visualize report runs/a
"""

import sys
from argparse import Namespace
from pathlib import Path

from matplotlib.figure import Figure

from inference import pictures
from inference.classifier import add_flags, classifier_of
from inference.report import report
from input_pipeline.folders import find_images
from input_pipeline.images import readable_files
from runtime.curves import draw_curves
from runtime.errors import Parser, UserError, check_positive, program
from runtime.files import written_whole
from runtime.sizes import size_text

PICTURES = {
    "curves": "training curves of one or several runs",
    "field": "effective receptive field of the deepest stage",
    "filters": "learned global filters, in frequency and in space",
    "gates": "the gates of each order of a gnConv, on one image",
    "cam": "where the network looks: Grad-CAM",
    "confusion": "confusion matrix of images in class folders, and the most confident mistakes",
    "report": "one HTML page about a run",
}


def parser() -> Parser:
    this = Parser("python -m tools.visualize", description=__doc__.splitlines()[0])
    what = this.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in PICTURES.items():
        sub = what.add_parser(name, help=text, description=text)
        add = sub.add_argument
        if name == "curves":
            add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
        elif name == "report":
            add("run", type=Path, metavar="RUN", help="folder of a run")
            add("--checkpoint", help="by default the run's best, or newest")
            add("--images", type=Path, metavar="FOLDER",
                help="class folders; by default the run's evaluation images")  # fmt: skip
        else:
            if name != "filters":
                add("images", nargs="+", metavar="IMAGE", help="files, or folders")
            add_flags(sub)
        if name in ("field", "cam", "report"):
            add("--count", type=int, default=8, help="number of images (8)")
        default = "FILE.html (RUN/report.html)" if name == "report" else "FILE.png"
        add("--output", type=Path, required=name != "report", help=default)
    return this


def draw(arguments: Namespace) -> Figure:
    what = arguments.what
    if what == "curves":
        return draw_curves(arguments.runs)
    classifier = classifier_of(arguments, takes_exported=what == "confusion")
    if what == "filters":
        return pictures.draw_filters(classifier)
    files, decoding = find_images(arguments.images), classifier.preprocessing.decoding
    if what == "confusion":
        return pictures.draw_confusion(classifier, readable_files(files, decoding))
    files = readable_files(pictures.spread(files, getattr(arguments, "count", 1)), decoding)
    examples = pictures.examples_of(classifier, files)
    try:
        return getattr(pictures, f"draw_{what}")(classifier, examples)
    except ValueError as error:  # the network refuses the size
        size = size_text(classifier.preprocessing.input_size)
        raise UserError(f"--input-size {size}: {error}") from None


@program(parser)
def main(arguments: Namespace) -> None:
    check_positive(arguments, *({"count"} & vars(arguments).keys()))
    is_report = arguments.what == "report"
    if is_report and not arguments.run.is_dir():
        raise UserError(f"{arguments.run} does not exist, or is not a folder")
    output = arguments.output or arguments.run / "report.html"
    suffix = ".html" if is_report else ".png"
    if output.suffix != suffix:
        raise UserError(f"--output {output}: give FILE{suffix}")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is not a folder")
    if is_report:
        text = report(arguments.run, arguments.checkpoint, arguments.images, arguments.count)
        with written_whole(output) as written:
            written.write_text(text, encoding="utf-8")
    else:
        figure = draw(arguments)
        with written_whole(output) as written:
            figure.savefig(written, dpi=130)
    sys.stdout.write(f"{output}\n")


if __name__ == "__main__":
    sys.exit(main())
