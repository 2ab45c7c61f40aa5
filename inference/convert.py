"""Conversion of a classifier's weights to another format, without changing them."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.data import infer_imagenet_subset

from checkpoints import reading
from checkpoints.sources import local_file
from inference.classifier import Classifier, load_classifier
from models import HorNet
from models.layouts import to_mmpretrain
from runtime.errors import UserError
from runtime.files import written_whole
from runtime.sizes import sides
from utils import count_parameters

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
- Images: {images}
- Classes: {classes}

```python
import timm
from PIL import Image

import hornet  # registers the models: pip install . in a clone of HorNet for PyTorch

model = timm.create_model("hf-hub:USER/{name}", pretrained=True).eval()  # or local-dir:FOLDER
{use}
```
"""  # noqa: E501
USE_OF_RGB = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])"""
USE_OF_ARRAYS = "logits = model(images)  # float32 {shape}, resized, scaled and normalised as above"


def convert(
    source: str, output: Path, model: str = "", ema: bool = False, layout: str = ""
) -> Classifier:
    """Write the classifier of `source` to `output`, then read it back and compare.

    `output` is FILE.pth, FILE.safetensors, or a new folder; with the layout 'mmpretrain', FILE.pth
    has mmpretrain's names. The rest is as for `load_classifier`. Raises UserError if the source
    can't be read, or `output` can't be written; then none is left.
    """
    if output.suffix not in (".pth", ".safetensors", ""):
        raise UserError(f"{output}: give FILE.pth, FILE.safetensors, or a folder without a suffix")
    if output.exists():
        raise UserError(f"{output} exists already: give another name")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: {output.parent} is not a folder")
    if layout and output.suffix != ".pth":
        raise UserError(f"{output}: --layout {layout} is for FILE.pth")
    classifier = load_classifier(source, model, ema, takes_exported=False)
    weights = classifier.model.state_dict()
    _check_unchanged(weights, source, ema)
    if (layout or not output.suffix) and not isinstance(classifier.model, HorNet):
        what = f"--layout {layout} is" if layout else "folders are"
        raise UserError(f"{output}: {what} for HorNets, not {classifier.config.model}")
    with written_whole(output) as written:
        rest = {"args": _flags(classifier), "classes": classifier.classes}
        if output.suffix == ".pth":
            data = io.BytesIO()  # on a full disk torch's own writer prints two tracebacks
            own = {"state_dict": to_mmpretrain(weights), "meta": {}} if layout else {}
            torch.save((own or {"model": weights}) | rest, data)
            written.write_bytes(data.getbuffer())
        elif output.suffix == ".safetensors":
            metadata = {"format": "pt", reading.METADATA: json.dumps(rest)}
            written.write_bytes(safetensors.torch.save(weights, metadata))
        else:
            _write_folder(classifier, written, source in timm.list_pretrained("hornet_*"))
        again = load_classifier(str(written))
        found = again.model.state_dict()
        facts = [
            (c.config.model, c.classes, c.preprocessing, c.multi_label) for c in (again, classifier)
        ]
        if facts[0] != facts[1] or not all(torch.equal(w, found[k]) for k, w in weights.items()):
            raise UserError(f"{output} reads as something else than was written: it is not kept")
    return classifier


def _check_unchanged(weights: dict[str, torch.Tensor], source: str, ema: bool) -> None:
    """Refuse weights that loading has changed: resized filters, a lower precision."""
    path = local_file(source)
    checkpoint = reading.read_checkpoint(path)
    saved = (reading.ema_weights_in if ema else reading.weights_in)(checkpoint, path)
    assert saved is not None
    for name, value in saved.items():
        # loading removes the prefixes of wrappers
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


def _flags(classifier: Classifier) -> dict[str, Any]:
    """Return the flags of the model and its preprocessing, as in a checkpoint."""
    config, preprocessing = classifier.config, classifier.preprocessing
    return {
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        "layer_scale_init_value": config.layer_scale_init_value,
        "input_size": preprocessing.input_size,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "crop_pct": preprocessing.crop_pct or 1.0,
        "crop_mode": "center" if preprocessing.crop_pct else "squash",
        "interpolation": "bicubic",
        "exif_orientation": preprocessing.decoding.exif_orientation,
        "background": preprocessing.decoding.background or "none",
        "in_chans": preprocessing.decoding.channels,
        "value_range": preprocessing.decoding.value_range,
    } | ({"problem_type": reading.MULTI_LABEL["problem_type"]} if classifier.multi_label else {})


def _write_folder(classifier: Classifier, folder: Path, is_published: bool) -> None:
    """Write config.json and model.safetensors by timm, and a model card to complete."""
    config, classes, flags = classifier.config, classifier.classes, _flags(classifier)
    size, kwargs = sides(flags["input_size"]), dict(config.model_kwargs)
    if not config.layer_scale_init_value:  # the weights have no layer scale
        kwargs["layer_scale_init_value"] = 0.0
    if flags["in_chans"] != 3:
        kwargs["in_chans"] = flags["in_chans"]
    model: Any = copy.copy(classifier.model)
    cfg = {name: flags[name] for name in reading.PREPROCESSING} | {
        "input_size": (flags["in_chans"], *size)
    }
    model.pretrained_cfg = model.pretrained_cfg | cfg
    kept = (*reading.DECODING, "value_range", "problem_type")
    facts: dict[str, Any] = {name: flags[name] for name in kept if name in flags}
    # transformers would name numbers LABEL_0, ...; but it knows the names of ImageNet's classes
    if classifier.named or not infer_imagenet_subset({"num_classes": len(classes)}):
        facts["label_names"] = classes
    try:
        timm.models.save_for_hf(model, str(folder), facts, kwargs, safe_serialization=True)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from None
    # timm and transformers take the classes from num_classes, and transformers refuses a second one
    config_file = folder / reading.FOLDER_CONFIG
    content = json.loads(config_file.read_text())
    content["model_args"].pop("num_classes", None)
    config_file.write_text(json.dumps(content, indent=2) + "\n")
    # timm's file is readable by its owner only
    (folder / reading.FOLDER_WEIGHTS).chmod((folder / reading.FOLDER_CONFIG).stat().st_mode)
    images, use = f"{size[0]} x {size[1]} pixels", USE_OF_RGB
    view = classifier.preprocessing
    if view.decoding.as_array:
        span = "from {:g} to {:g}".format(*view.decoding.value_range or (0, 1))
        span += "" if view.decoding.value_range else " (of 8 or 16 bits, divided by their largest)"
        images += f", {view.decoding.channels} channels; values {span} become 0 to 1, and are "
        images += f"normalised by the mean {list(view.mean)} and deviation {list(view.std)}"
        use = USE_OF_ARRAYS.format(shape=(1, view.decoding.channels, *size))
    card = CARD.format(
        name=folder.name,
        license="mit" if is_published else "unknown  # say under which licence you give it",
        model=config.model,
        parameters=f"{count_parameters(model) / 1e6:.1f}",
        images=images,
        use=use,
        classes=f"{len(classes)}, any number of them per image: take the sigmoid of the logits"
        if classifier.multi_label
        else len(classes),
    )
    (folder / "README.md").write_text(card)
