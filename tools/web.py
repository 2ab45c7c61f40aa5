"""Serves a web page to try a classifier, detector or segmentor.

python -m tools.web --checkpoint runs/mine/checkpoint-best.pth
python -m tools.web --checkpoint work_dirs/mine/epoch_12.pth --config work_dirs/mine/mine.py
"""

import html
import os
import signal
import socket
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from dense.classes import check_heads
from dense.configs import import_quietly, read_config
from dense.pictures import Artist
from dense.predict import Predictor
from dense.run import need_stack
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

SHOWN_SIDE = 448  # pixels of a picture on the page
LOOKS = "where it looks"
LOOPBACK = ("127.0.0.1", "localhost")
QUEUED: Any = {"trigger_mode": "multiple", "concurrency_id": "network"}
"""Events wait for each other: the answer to the last stays, and Grad-CAM is not thread-safe."""
HEAD = """<style>
.image-frame img { width: 100%; height: 100%; object-fit: contain !important; }
</style>
<script>
document.addEventListener("load", ({target}) => {  // small images keep their pixels as squares
  if (2 * target.naturalWidth <= target.width) target.style.imageRendering = "pixelated";
}, true);
</script>"""


def parser() -> Parser:
    this = Parser("python -m tools.web", description=__doc__.splitlines()[0])
    add_flags(this)
    add = this.add_argument
    add("--config", help="of a detector or segmentor: its config, which training saves beside it")
    add("--examples", type=Path, metavar="FOLDER",
        help="images to choose from; by default the run's evaluation images")  # fmt: skip
    add("--host", default="127.0.0.1",
        help="127.0.0.1: this machine only; 0.0.0.0: everyone who can reach it")  # fmt: skip
    add("--port", type=int, help="by default the first free one from 7860 on")
    return this


def page(title: str, note: str, examples: list[Path], add_outputs: Callable[[Any], None]) -> Any:
    """Return a page with an image to drop, as an application of Gradio.

    `add_outputs` takes that image, adds what stands beside it, and connects both.
    """
    gradio = _gradio()
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(f"## {title}\n{note}")
        with gradio.Row():
            image = gradio.Image(type="filepath", image_mode=None, height=SHOWN_SIDE,
                                 sources=["upload", "clipboard"], label="image")  # fmt: skip
            # pass on the file itself, so that it is read, or refused, as in other tools
            image.preprocess = lambda payload: payload and payload.path  # type: ignore
            add_outputs(image)
        if examples:
            gradio.Examples([[str(file)] for file in examples], image)
    return blocks


def classifier_page(classifier: Classifier, source: str, examples: list[Path]) -> Any:
    """Return the page of a classifier out of the file `source`.

    Raises UserError if the network is not a HorNet, MissingPackageError without Gradio.
    """
    gradio = _gradio()
    hornet(classifier)
    names = _distinct([printable(name) for name in classifier.labels])

    def show(file: str | None, chosen: str | None = None) -> tuple[dict | None, Any]:
        if not file:
            return None, gradio.Image(None, label=LOOKS)
        label = None if chosen is None else names.index(chosen)
        try:
            shares, image = answer(classifier, Path(file), label)
        except UserError as error:
            raise _shown(error, file) from None
        looked_for = names[int(np.argmax(shares)) if label is None else label]
        looks = gradio.Image(image, label=f"{LOOKS} for {looked_for}")
        return dict(zip(names, shares, strict=True)), looks

    def look_for(file: str | None, event: gradio.SelectData) -> Any:  # type: ignore[name-defined]
        return show(file, event.value)[1]

    def add_outputs(image: Any) -> None:
        looks = _picture(LOOKS)
        classes = gradio.Label(num_top_classes=5,
                               label="classes: click on one to see where it is")  # fmt: skip
        image.change(show, image, [classes, looks], **QUEUED)
        classes.select(look_for, image, looks, **QUEUED)

    height, width = sides(classifier.preprocessing.input_size)
    note = (
        f"In the middle is what the network sees of an image, {height} x {width} pixels. "
        "Red is evidence for the class, blue is none."
    )
    title = f"{classifier.config.model}, {len(names)} classes · {_name(source)}"
    return page(title, note, examples, add_outputs)


def dense_page(artist: Artist, model: str, source: str, examples: list[Path]) -> Any:
    """Return the page of a detector or segmentor out of the file `source`."""
    gradio = _gradio()

    def show(file: str | None, threshold: float = 0.0) -> tuple[Image.Image | None, str]:
        if not file:
            return None, ""
        try:
            picture, legend = artist(file, threshold)
        except UserError as error:
            raise _shown(error, file) from None
        lines = [
            f'<span style="border-left: 1em solid rgb{entry.color}; padding-left: 0.4em">'
            f"{html.escape(entry.name)}&nbsp;{entry.amount}</span>"
            for entry in legend
        ]
        return picture, " &ensp; ".join(lines) or "nothing"

    def add_outputs(image: Any) -> None:
        inputs = [image]
        with gradio.Column():
            picture = _picture("what it finds")
            legend = gradio.HTML()
            if artist.is_detector:
                inputs.append(gradio.Slider(0, 1, 0.3, step=0.05, label="lowest score"))
        for part in inputs:
            part.change(show, inputs, [picture, legend], **QUEUED)

    title = f"{model}, {len(artist.names)} classes · {_name(source)}"
    note = "Below the picture is how much there is of each class."
    if artist.is_detector:
        note = "Each box has its class and score. The slider sets the lowest score that is shown."
    return page(title, note, examples, add_outputs)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise MissingPackageError("the page needs Gradio: pip install '.[web]'") from None
    return gradio


def _picture(label: str) -> Any:
    return _gradio().Image(interactive=False, format="png", height=SHOWN_SIDE, label=label,
                           buttons=["download", "fullscreen"])  # fmt: skip


def _shown(error: UserError, file: str) -> Exception:
    """Return an error that the page shows, without Gradio's folder."""
    return _gradio().Error(str(error).replace(file, Path(file).name), print_exception=False)


def _name(source: str) -> str:
    """Return the last part of a path or URL."""
    return printable(Path(urlsplit(source).path if "://" in source else source).name)


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
    _gradio()
    page_of = _dense_page if arguments.config else _classifier_page
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks for its own page
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK, arguments.host)))
    with TemporaryDirectory(prefix="hornet-web-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page_of(arguments).launch(
            server_name=arguments.host, server_port=arguments.port, share=False, show_error=True,
            footer_links=["api", "settings"], head=HEAD)  # fmt: skip


def _classifier_page(arguments: Namespace) -> Any:
    classifier = classifier_of(arguments, takes_exported=False)
    examples = _examples(arguments, lambda: images_of(classifier.flags))
    return classifier_page(classifier, arguments.checkpoint, examples)


def _dense_page(arguments: Namespace) -> Any:
    if arguments.model or arguments.ema or arguments.input_size:
        raise UserError("--config: its model has no --model, --ema or --input-size")
    need_stack()
    import_quietly()
    from dense.outputs import folders_of

    config = read_config(arguments.config)
    check_heads(config, ("test",))
    predictor = Predictor(config, arguments.checkpoint)
    examples = _examples(
        arguments, lambda: find_images([*filter(os.path.isdir, folders_of(predictor.dataset))])
    )
    model = printable(Path(arguments.config).stem)
    return dense_page(Artist(predictor), model, arguments.checkpoint, examples)


def _examples(arguments: Namespace, own: Callable[[], list[Path]]) -> list[Path]:
    """Return images of --examples; without it the run's evaluation images, if there are any."""
    if arguments.examples:
        return spread(find_images([str(arguments.examples)]), 10)
    try:  # the run's own images are private
        return spread(own(), 10) if arguments.host in LOOPBACK else []
    except UserError:
        return []


if __name__ == "__main__":
    sys.exit(main())
