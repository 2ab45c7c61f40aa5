"""A web page to try a classifier on: its likeliest classes of an image, and where it looks.

python -m tools.web --checkpoint runs/mine/checkpoint-best.pth
"""

import argparse
import os
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from inference import insight
from inference.classifier import Classifier, add_flags, load_classifier
from inference.pictures import CAM_ALPHA, examples_of, hornet
from inference.report import images_of, spread
from input_pipeline.images import find_images
from runtime.errors import (
    MissingPackageError,
    UserError,
    check_positive,
    reason_of,
    run_program,
)

SHOWN_SIDE = 448
"""Pixels of the picture of where the network looks."""
LOOKS = "where it looks"
LOOPBACK = ("127.0.0.1", "localhost")


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.web", description="A web page to try a classifier on."
    )
    add_flags(this)
    this.add_argument("--examples", type=Path, metavar="FOLDER",
                      help="images to choose from (the run's own to evaluate on)")  # fmt: skip
    this.add_argument("--host", default="127.0.0.1",
                      help="127.0.0.1: this machine only; 0.0.0.0: all that reach it")  # fmt: skip
    this.add_argument("--port", type=int, help="the first free one from 7860 on if not given")
    return this


def answer(
    classifier: Classifier, file: Path, label: int | None = None
) -> tuple[list[float], Image.Image]:
    """The probability of each class, and where the network looks for one of them.

    Args:
        classifier: A HorNet.
        file: An image.
        label: The class that is looked for; the likeliest if not given.

    Raises:
        UserError: the file cannot be read.
    """
    examples = examples_of(classifier, [file])
    network = hornet(classifier)
    with torch.no_grad():
        shares = network(examples.inputs)[0].softmax(0)
    label = int(shares.argmax()) if label is None else label
    heat = insight.grad_cam(network, examples.inputs, torch.tensor([label]))[0].numpy()
    picture = (1 - CAM_ALPHA) * examples.pixels[0] + CAM_ALPHA * colormaps["jet"](heat)[..., :3]
    image = Image.fromarray((255 * picture).round().astype(np.uint8))
    side = max(SHOWN_SIDE, image.width)
    return shares.tolist(), image.resize((side, side), Image.Resampling.BICUBIC)


def page(classifier: Classifier, source: str, examples: list[Path]) -> Any:
    """The page, as an application of Gradio; `source` says which weights these are.

    Raises:
        MissingPackageError: Gradio is not installed.
        UserError: the network is no HorNet.
    """
    try:
        import gradio
    except ImportError:
        raise MissingPackageError("the page needs Gradio: pip install '.[web]'") from None
    hornet(classifier)
    names = _distinct(classifier.labels)

    def show(file: str | None, chosen: str | None = None) -> tuple[dict | None, Any]:
        if not file:
            return None, gradio.Image(None, label=LOOKS)
        label = None if chosen is None else names.index(chosen)
        try:
            shares, image = answer(classifier, Path(file), label)
        except UserError as error:
            reason = str(error).replace(file, Path(file).name)  # Gradio's folders say nothing
            raise gradio.Error(reason, print_exception=False) from None
        looked_for = names[int(np.argmax(shares)) if label is None else label]
        looks = gradio.Image(image, label=f"{LOOKS} for {looked_for}")
        return dict(zip(names, shares, strict=True)), looks

    def look_for(file: str | None, event: gradio.SelectData) -> Any:
        return show(file, event.value)[1]

    title = f"{source}: {classifier.config.model}, {len(names)} classes"
    size = classifier.preprocessing.input_size
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(
            f"## {title}\nIn the middle is what the network sees of an image, {size} x {size} "
            "pixels: the redder, the more speaks for the class; blue is no evidence."
        )
        with gradio.Row():
            image = gradio.Image(type="filepath", image_mode=None, height=SHOWN_SIDE,
                                 sources=["upload", "clipboard"], label="image")  # fmt: skip
            # the file itself, so that it is read, or refused, as everywhere else
            image.preprocess = lambda payload: payload and payload.path  # type: ignore
            looks = gradio.Image(interactive=False, format="png", height=SHOWN_SIDE,
                                 buttons=["download", "fullscreen"],
                                 label=LOOKS)  # fmt: skip
            classes = gradio.Label(
                num_top_classes=5, label="classes: click on one to see where it is looked for"
            )
        if examples:
            gradio.Examples([[str(file)] for file in examples], image)
        # what comes faster than answers is answered in turn: the last click stays, and no two
        # look into the network at once
        in_turn: Any = {"trigger_mode": "multiple", "concurrency_id": "network"}
        image.change(show, image, [classes, looks], **in_turn)
        classes.select(look_for, image, looks, **in_turn)
    return blocks


def _distinct(names: list[str]) -> list[str]:
    """The names, with their number where several classes have the same one."""
    counts = Counter(names)
    numbered = [f"{name} ({label})" for label, name in enumerate(names)]
    some = [
        number if counts[name] > 1 else name for name, number in zip(names, numbered, strict=True)
    ]
    return some if len(set(some)) == len(names) else numbered


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.web", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    check_positive(arguments, "input_size", "port")
    try:  # before the model is loaded; Gradio would try each of its ports, in vain
        socket.create_server((arguments.host, arguments.port or 0)).close()
    except (OSError, OverflowError) as error:
        where = f"--host {arguments.host} --port {arguments.port or 'any'}"
        raise UserError(f"{where}: no page can be served there: {reason_of(error)}") from None
    if arguments.examples and not arguments.examples.is_dir():
        raise UserError(f"--examples {arguments.examples} is no folder")
    classifier = load_classifier(
        arguments.checkpoint, arguments.model, arguments.ema, arguments.input_size, False
    )
    # the run's own images are for its owner, not for all who reach the page
    is_private = arguments.host in LOOPBACK
    examples = _examples(classifier, arguments.examples, is_private)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed
    _spare_proxies(arguments.host)
    with TemporaryDirectory(prefix="hornet-web-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page(classifier, arguments.checkpoint, examples).launch(
            server_name=arguments.host, server_port=arguments.port, share=False, show_error=True,
            footer_links=["api", "settings"])  # fmt: skip
    return 0


def _spare_proxies(host: str) -> None:
    """Lets Gradio see its own page where a proxy is set for the rest of the world."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK, host)))


def _examples(
    classifier: Classifier, folder: Path | None, takes_own: bool, count: int = 10
) -> list[Path]:
    """Images to choose from; none where none are named and the run's own are not there."""
    if folder is None and not takes_own:
        return []
    try:
        files = find_images([str(folder)]) if folder else images_of(classifier.flags)
        return spread(files, count)
    except UserError:
        if folder is None:
            return []
        raise


if __name__ == "__main__":
    sys.exit(main())
