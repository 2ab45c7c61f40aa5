"""Configs of mmdet and mmseg: read, and walked through."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def read_config(name: str, task: str = "") -> Any:
    """The config of a path, from here or from inside the folder of `task`.

    Raises:
        UserError: the file does not exist, or cannot be read, or is a part of other configs.
    """
    from mmengine.config import Config

    path = Path(name)
    if not path.is_file():
        path = Path(__file__).resolve().parents[1] / task / path  # as it is written in the tree
    if not path.is_file():
        raise UserError(f"config {name} does not exist" + (f", nor in {task}/" if task else ""))
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can raise anything
        raise UserError(f"config {path} cannot be read: {error!r}") from None
    if "model" not in config or "train_dataloader" not in config:
        raise UserError(f"config {path} is a part of others: it lacks a model or its data")
    return config


def dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Every dict in a config or a part of one, itself included."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from dicts(inner)
