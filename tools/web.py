"""Serves a web page to try a classifier.

python -m tools.web --checkpoint runs/mine/checkpoint-best.pth
"""

import os
import signal
import socket
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from inference import insight
from inference.classifier import Classifier, add_flags, classifier_of
from inference.labels import printable
from inference.pictures import CAM_ALPHA, examples_of, hornet, spread
from inference.report import images_of
from input_pipeline.folders import find_images
from runtime.errors import (
    MissingPackageError,
    Parser,
    UserError,
    check_positive,
    program,
    reason_of,
)
from runtime.sizes import sides

SHOWN_SIDE = 448  # pixels of the picture of where the network looks
LOOKS = "where it looks"
LOOPBACK = ("127.0.0.1", "localhost")


def parser() -> Parser:
    this = Parser("python -m tools.web", description=__doc__.splitlines()[0])
    add_flags(this)
    add = this.add_argument
    add("--examples", type=Path, metavar="FOLDER",
        help="images to choose from; by default the run's evaluation images")  # fmt: skip
    add("--host", default="127.0.0.1",
        help="127.0.0.1: this machine only; 0.0.0.0: everyone who can reach it")  # fmt: skip
    add("--port", type=int, help="by default the first free one from 7860 on")
    return this


def answer(
    classifier: Classifier, file: Path, label: int | None = None
) -> tuple[list[float], Image.Image]:
    """Return the probability of each class, and where a HorNet sees one, by default the likeliest.

    Raises UserError if the file cannot be read.
    """
    examples = examples_of(classifier, [file])
    network = hornet(classifier)
    with torch.no_grad():
        shares = classifier.probabilities(network(examples.inputs))[0]
    label = int(shares.argmax()) if label is None else label
    heat = insight.grad_cam(network, examples.inputs, torch.tensor([label]))[0].numpy()
    picture = (1 - CAM_ALPHA) * examples.pixels[0] + CAM_ALPHA * colormaps["jet"](heat)[..., :3]
    image = Image.fromarray((255 * picture).round().astype(np.uint8))
    scale = max(1.0, SHOWN_SIDE / max(image.size))
    shown = round(scale * image.width), round(scale * image.height)
    return shares.tolist(), image.resize(shown, Image.Resampling.BICUBIC)


def page(classifier: Classifier, source: str, examples: list[Path]) -> Any:
    """Return the page as an application of Gradio, with `source` in its title.

    Raises UserError if the network is not a HorNet, MissingPackageError without Gradio.
    """
    try:
        import gradio
    except ImportError:
        raise MissingPackageError("the page needs Gradio: pip install '.[web]'") from None
    hornet(classifier)
    names = _distinct([printable(name) for name in classifier.labels])

    def show(file: str | None, chosen: str | None = None) -> tuple[dict | None, Any]:
        if not file:
            return None, gradio.Image(None, label=LOOKS)
        label = None if chosen is None else names.index(chosen)
        try:
            shares, image = answer(classifier, Path(file), label)
        except UserError as error:
            reason = str(error).replace(file, Path(file).name)  # without Gradio's folder
            raise gradio.Error(reason, print_exception=False) from None
        looked_for = names[int(np.argmax(shares)) if label is None else label]
        looks = gradio.Image(image, label=f"{LOOKS} for {looked_for}")
        return dict(zip(names, shares, strict=True)), looks

    def look_for(file: str | None, event: gradio.SelectData) -> Any:
        return show(file, event.value)[1]

    title = f"{source}: {classifier.config.model}, {len(names)} classes"
    height, width = sides(classifier.preprocessing.input_size)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(
            f"## {title}\nIn the middle is what the network sees of an image, {height} x {width} "
            "pixels. Red is evidence for the class, blue is none."
        )
        with gradio.Row():
            image = gradio.Image(type="filepath", image_mode=None, height=SHOWN_SIDE,
                                 sources=["upload", "clipboard"], label="image")  # fmt: skip
            # pass on the file itself, so that it is read, or refused, as in other tools
            image.preprocess = lambda payload: payload and payload.path  # type: ignore
            looks = gradio.Image(interactive=False, format="png", height=SHOWN_SIDE, label=LOOKS,
                                 buttons=["download", "fullscreen"])  # fmt: skip
            classes = gradio.Label(num_top_classes=5,
                                   label="classes: click on one to see where it is")  # fmt: skip
        if examples:
            gradio.Examples([[str(file)] for file in examples], image)
        # queue clicks: the answer to the last one stays, and Grad-CAM is not thread-safe
        in_turn: Any = {"trigger_mode": "multiple", "concurrency_id": "network"}
        image.change(show, image, [classes, looks], **in_turn)
        classes.select(look_for, image, looks, **in_turn)
    return blocks


def _distinct(names: list[str]) -> list[str]:
    """Add the number of the class to names that are not unique."""
    counts = Counter(names)
    numbered = [f"{name} ({label})" for label, name in enumerate(names)]
    some = [numbered[i] if counts[name] > 1 else name for i, name in enumerate(names)]
    return some if len(set(some)) == len(names) else numbered


@program(parser)
def main(arguments: Namespace) -> None:
    check_positive(arguments, "port")
    try:  # before the model is loaded; Gradio would try all of its ports
        socket.create_server((arguments.host, arguments.port or 0)).close()
    except (OSError, OverflowError) as error:
        where = f"--host {arguments.host} --port {arguments.port or 'any'}"
        raise UserError(f"{where}: no page can be served there: {reason_of(error)}") from None
    if arguments.examples and not arguments.examples.is_dir():
        raise UserError(f"--examples {arguments.examples} is not a folder")
    classifier = classifier_of(arguments, takes_exported=False)
    # the run's own images are private
    examples = _examples(classifier, arguments.examples, arguments.host in LOOPBACK)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks for its own page
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK, arguments.host)))
    with TemporaryDirectory(prefix="hornet-web-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page(classifier, arguments.checkpoint, examples).launch(
            server_name=arguments.host, server_port=arguments.port, share=False, show_error=True,
            footer_links=["api", "settings"])  # fmt: skip


def _examples(classifier: Classifier, folder: Path | None, takes_own: bool) -> list[Path]:
    """Return images of the folder; without one the run's evaluation images, if there are any."""
    if folder:
        return spread(find_images([str(folder)]), 10)
    try:
        return spread(images_of(classifier.flags), 10) if takes_own else []
    except UserError:
        return []


if __name__ == "__main__":
    sys.exit(main())
