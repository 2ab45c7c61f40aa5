"""Weights in another form, the same to the last bit.

python -m tools.convert runs/mine/checkpoint-best.pth mine.safetensors
python -m tools.convert hornet_tiny_gf.in1k hornet_tiny_gf
python -m tools.convert hornet_tiny_gf hornet_tiny_gf.pth

The form is what the name of the output ends in: .pth for one that the release reads too,
.safetensors, or none for a folder in the form of timm and Hugging Face (config.json,
model.safetensors, README.md), which timm.create_model('local-dir:FOLDER', pretrained=True) loads.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from checkpoints.reading import (
    FOLDER_CONFIG,
    FOLDER_WEIGHTS,
    METADATA,
    PREPROCESSING,
    ema_weights_in,
    read_checkpoint,
    weights_in,
)
from checkpoints.sources import local_file
from models import HorNet
from runtime.errors import UserError, run_program
from runtime.files import written_whole
from tools.classifier import Classifier, load_classifier
from utils import numbered_classes

FORMS = (".pth", ".safetensors", "")
FOLDER_CARD = "README.md"

CARD = """---
tags:
- image-classification
- timm
- hornet
pipeline_tag: image-classification
library_name: timm
license: {license}
---
# {name}

An image classifier: HorNet, with recursive gated convolutions ([paper](https://arxiv.org/abs/2207.14284)).

- Model: `{model}`, {parameters} M parameters
- Images: {size} x {size} pixels
- Classes: {classes}

```python
import timm
from PIL import Image

import hornet  # registers the models: pip install . in a clone of HorNet for PyTorch

model = timm.create_model("hf-hub:USER/{name}", pretrained=True).eval()  # or local-dir:FOLDER
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
```
"""  # noqa: E501


def parser() -> argparse.ArgumentParser:
    this = argparse.ArgumentParser(
        "python -m tools.convert",
        description="Writes a classifier's weights in another form: .pth, .safetensors or a folder "
        "of timm's.",
    )
    add = this.add_argument
    add("source", help="path, address, or name of published weights; or a folder of timm's")
    add("output", type=Path, help="FILE.pth, FILE.safetensors, or a new folder")
    add("--model", default="", help="its model, where the source names none")
    add("--ema", action="store_true", help="take the moving average of the weights")
    return this


def convert(source: str, output: Path, model: str = "", ema: bool = False) -> Classifier:
    """Writes the classifier of `source` in the form of `output`, and reads it to compare.

    Raises:
        UserError: the source cannot be read, or the output not be written; nothing is left of it.
    """
    if output.suffix not in FORMS:
        raise UserError(f"{output}: give FILE.pth, FILE.safetensors, or a folder without a suffix")
    if output.exists():
        raise UserError(f"{output} exists already: give another name")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: {output.parent} is no folder")
    classifier = load_classifier(source, model, ema, takes_exported=False)
    weights = classifier.model.state_dict()
    _check_unchanged(weights, source, ema)
    if not output.suffix and not isinstance(classifier.model, HorNet):
        raise UserError(f"{output}: folders are for HorNets, not {classifier.config.model}")
    with written_whole(output) as written:
        if output.suffix == ".pth":
            data = io.BytesIO()  # on a full disk torch's own writer would fail in two tracebacks
            torch.save({"model": weights, **_rest(classifier)}, data)
            written.write_bytes(data.getbuffer())
        elif output.suffix == ".safetensors":
            _write_safetensors(weights, written, {METADATA: json.dumps(_rest(classifier))})
        else:
            _write_folder(classifier, weights, written, source in timm.list_pretrained("hornet_*"))
        again = load_classifier(str(written))
        found = again.model.state_dict()
        if (
            not all(torch.equal(value, found[name]) for name, value in weights.items())
            or again.config.model != classifier.config.model
            or (again.classes, again.view) != (classifier.classes, classifier.view)
        ):
            raise UserError(f"{output} reads as something else than was written: it is not kept")
    return classifier


def _write_safetensors(
    weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]
) -> None:
    # save_file would make a file that nobody else may read
    path.write_bytes(safetensors.torch.save(weights, {"format": "pt", **metadata}))


def _check_unchanged(weights: dict[str, torch.Tensor], source: str, ema: bool) -> None:
    """Refuses what loading has changed: filters of another size, digits of another type."""
    path = local_file(source)
    checkpoint = read_checkpoint(path)
    saved = ema_weights_in(checkpoint, path) if ema else weights_in(checkpoint, path)
    assert saved is not None
    for name, value in saved.items():
        # a known prefix, as of a wrapper, has been taken off
        own = name if name in weights else next(k for k in weights if name.endswith(f".{k}"))
        ours = weights[own]
        if value.shape != ours.shape:
            raise UserError(
                f"{source}: {name} is {list(value.shape)}, the model's {list(ours.shape)}: its "
                "arguments (model_kwargs) are not in the file"
            )
        if not torch.equal(ours.to(value.dtype), value) or value.dtype.itemsize > ours.itemsize:
            raise UserError(
                f"{source}: {name} is {value.dtype}, more than the model's {ours.dtype}"
            )


def _rest(classifier: Classifier) -> dict[str, Any]:
    """What a checkpoint has beside weights: the flags of the model and its images, the classes."""
    config, view = classifier.config, classifier.view
    flags = {
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        "layer_scale_init_value": config.layer_scale_init_value,
        "input_size": view.input_size,
        "mean": list(view.mean),
        "std": list(view.std),
        "crop_pct": view.crop_pct or 1.0,
        "crop_mode": "center" if view.crop_pct else "squash",
        "interpolation": "bicubic",
    }
    return {"args": flags, "classes": classifier.classes}


def _write_folder(
    classifier: Classifier, weights: dict[str, torch.Tensor], folder: Path, is_published: bool
) -> None:
    model, config, view = classifier.model, classifier.config, classifier.view
    flags = _rest(classifier)["args"]
    if not config.layer_scale_init_value:  # then the weights have none
        flags["model_kwargs"] = flags["model_kwargs"] | {"layer_scale_init_value": 0.0}
    classes = classifier.classes
    cfg = {name: model.pretrained_cfg[name] for name in ("first_conv", "classifier")}  # type: ignore[index]
    has_names = classes != numbered_classes(len(classes))
    parameters = sum(p.numel() for p in model.parameters())
    card = CARD.format(
        name=folder.name,
        license="mit" if is_published else "unknown  # say under which licence you give it",
        model=config.model,
        parameters=f"{parameters / 1e6:.1f}",
        size=view.input_size,
        classes=len(classes),
    )
    folder.mkdir()
    (folder / FOLDER_CONFIG).write_text(_folder_config(flags, classes, has_names, cfg))
    (folder / FOLDER_CARD).write_text(card)
    _write_safetensors(weights, folder / FOLDER_WEIGHTS, {})


def _folder_config(
    flags: dict[str, Any], classes: list[str], has_names: bool, cfg: dict[str, Any]
) -> str:
    """The text of config.json; `cfg` has what else timm wants to know."""
    size = flags["input_size"]
    view = {name: flags[name] for name in PREPROCESSING}
    facts = {
        "architecture": flags["model"],
        "num_classes": len(classes),
        "model_args": flags["model_kwargs"],
        "pretrained_cfg": cfg | {"num_classes": len(classes), "input_size": (3, size, size)} | view,
    }
    return json.dumps(facts | ({"label_names": classes} if has_names else {}), indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_program("tools.convert", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    output = arguments.output
    classifier = convert(arguments.source, output, arguments.model, arguments.ema)
    sys.stdout.write(f"{output}: {classifier.config.model}, {len(classifier.classes)} classes\n")
    if not output.suffix:
        sys.stdout.write(
            f"timm.create_model('local-dir:{output}', pretrained=True) loads it once the "
            "models are registered (import models, or hornet)\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
