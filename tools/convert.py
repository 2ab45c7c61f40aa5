"""Weights in another form, the same to the last bit.

python -m tools.convert runs/mine/checkpoint-best.pth mine.safetensors
python -m tools.convert hornet_tiny_gf.in1k hornet_tiny_gf
python -m tools.convert hornet_tiny_gf hornet_tiny_gf.pth

The form is what the name of the output ends in: .pth for one that the release reads too,
.safetensors, or none for a folder in the form of timm and Hugging Face (config.json,
model.safetensors, README.md), which timm.create_model('local-dir:FOLDER', pretrained=True) loads.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models import filter_pretrained_cfg
from timm.models._hub import generate_readme

from datasets import unnamed
from runtime import checkpoint
from runtime.errors import UserError
from tools.classifier import Classifier, load_classifier
from tools.exported import Exported
from tools.outputs import kept_when_done

FORMS = (".pth", ".safetensors", "")

USAGE = """```python
import timm
from PIL import Image

import hornet  # registers the models: pip install . in a clone of HorNet for PyTorch

model = timm.create_model("hf-hub:USER/{name}", pretrained=True).eval()  # or local-dir:FOLDER
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
```"""
CITATION = """@article{rao2022hornet,
  title={HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions},
  author={Rao, Yongming and Zhao, Wenliang and Tang, Yansong and Zhou, Jie and Lim, Ser-Nam and Lu, Jiwen},
  journal={Advances in Neural Information Processing Systems},
  year={2022}
}"""  # noqa: E501


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
    if not output.suffix and output.exists():
        raise UserError(f"{output} exists already: give a new folder")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: {output.parent} is no folder")
    classifier = load_classifier(source, model, ema)
    if isinstance(classifier.model, Exported):
        raise UserError(f"{source} is exported: give the checkpoint that it was made of")
    weights = {k: v.contiguous() for k, v in classifier.model.state_dict().items()}
    with kept_when_done(output) as written:
        if output.suffix == ".pth":
            torch.save({"model": weights, **_rest(classifier)}, written)
        elif output.suffix == ".safetensors":
            _write_safetensors(
                weights, written, {checkpoint.METADATA: json.dumps(_rest(classifier))}
            )
        else:
            _write_folder(classifier, weights, written)
        again = load_classifier(str(written))
        found = again.model.state_dict()
        same = all(torch.equal(value, found[name]) for name, value in weights.items())
        facts = [(c.config.model, c.classes, c.view) for c in (classifier, again)]
        if not same or facts[0] != facts[1]:
            raise AssertionError(f"{output} reads as something else than was written")
    return classifier


def _write_safetensors(
    weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]
) -> None:
    # save_file would make a file that nobody else may read
    path.write_bytes(safetensors.torch.save(weights, {"format": "pt", **metadata}))


def _rest(classifier: Classifier) -> dict[str, Any]:
    """What a checkpoint has beside weights: the flags of the model and its images, the classes."""
    config, view = classifier.config, classifier.view
    flags = {
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        "layer_scale_init_value": config.layer_scale_init_value,
        "input_size": view.input_size,
        "crop_pct": view.crop_pct,
        "imagenet_default_mean_and_std": view.mean == IMAGENET_DEFAULT_MEAN,
    }
    return {"args": flags, "classes": classifier.classes}


def _write_folder(classifier: Classifier, weights: dict[str, torch.Tensor], folder: Path) -> None:
    model, config, view = classifier.model, classifier.config, classifier.view
    config_file, weights_file, card_file = (folder / name for name in checkpoint.FOLDER_FILES)
    model_args = dict(config.model_kwargs)
    if "layer_scale_init_value" in model_args or not config.layer_scale_init_value > 0:
        model_args["layer_scale_init_value"] = config.layer_scale_init_value  # none in the weights
    cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    for name in ("architecture", "tag", "pool_size", "description"):  # said elsewhere, or of others
        cfg.pop(name, None)
    cfg |= {
        "num_classes": len(classifier.classes),
        "input_size": (3, view.input_size, view.input_size),
        "mean": view.mean,
        "std": view.std,
        "crop_pct": view.crop_pct or 1.0,
        "crop_mode": "center" if view.crop_pct else "squash",
        "interpolation": "bicubic",
    }
    facts = {
        "architecture": config.model,
        "num_classes": len(classifier.classes),
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": cfg,
    }
    if classifier.classes != unnamed(len(classifier.classes)):
        facts["label_names"] = classifier.classes
    folder.mkdir()
    config_file.write_text(json.dumps(facts, indent=2) + "\n")
    _write_safetensors(weights, weights_file, {})
    parameters = sum(p.numel() for p in model.parameters())
    card = {
        "license": "mit",
        "tags": ["image-classification", "timm", "hornet"],
        "description": "An image classifier: HorNet, with recursive gated convolutions.",
        "details": {
            "Model": config.model,
            "Parameters (M)": f"{parameters / 1e6:.1f}",
            "Image size": f"{view.input_size} x {view.input_size}",
            "Classes": str(len(classifier.classes)),
            "Paper": "https://arxiv.org/abs/2207.14284",
        },
        "usage": USAGE.format(name=folder.name),
        "citation": CITATION,
    }
    card_file.write_text(generate_readme(card, folder.name))


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        classifier = convert(arguments.source, arguments.output, arguments.model, arguments.ema)
    except UserError as error:
        sys.stderr.write(f"tools.convert: error: {' '.join(str(error).split())}\n")
        return 1
    name, count = classifier.config.model, len(classifier.classes)
    sys.stdout.write(f"{arguments.output}: {name}, {count} classes\n")
    if not arguments.output.suffix:
        sys.stdout.write(
            f"timm.create_model('local-dir:{arguments.output}', pretrained=True) loads it once the "
            "models are registered (import models, or hornet)\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
