"""A model in the form of timm and Hugging Face: a folder with these files.

config.json says what the weights are and how images become their input, README.md is the card.
"""

import json
from pathlib import Path
from typing import Any

from runtime.errors import UserError

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
VIEW = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
"""What config.json and flags have in common of the preprocessing, beside the size."""


def is_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside weights: args (flags), and classes where they have names.

    Raises:
        UserError: config.json cannot be read, or is another's.
    """
    path = folder / CONFIG
    try:
        facts = json.loads(path.read_text())
        cfg = facts["pretrained_cfg"]
        channels, height, width = cfg["input_size"]
        if (channels, height) != (3, width):
            raise ValueError(f"images of {cfg['input_size']}")
        flags = {"model": facts["architecture"], "model_kwargs": facts.get("model_args", {}),
                 "input_size": height} | {name: cfg[name] for name in VIEW}  # fmt: skip
        names = facts.get("label_names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is none of timm's: {type(error).__name__} {error}") from None
    return {"args": flags} | ({"classes": names} if names else {})


def config_of(
    flags: dict[str, Any], classes: list[str], has_names: bool, cfg: dict[str, Any]
) -> str:
    """The text of config.json: `read_config` backwards; `cfg` has what else timm wants to know."""
    size = flags["input_size"]
    view = {name: flags[name] for name in VIEW}
    facts = {
        "architecture": flags["model"],
        "num_classes": len(classes),
        "model_args": flags["model_kwargs"],
        "pretrained_cfg": cfg | {"num_classes": len(classes), "input_size": (3, size, size)} | view,
    }
    return json.dumps(facts | ({"label_names": classes} if has_names else {}), indent=2) + "\n"
