"""Other HorNets to measure against: files that register hornet_* names with timm."""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import _registry, register_model
from torch import nn

from runtime.errors import UserError

PLAIN = Path(__file__).with_name("plain_peer.py")


def register(name: str, build: Callable[..., nn.Module], module: str) -> None:
    """Registers build(**options) with timm under that name, as a peer's file of that module."""

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        **options: Any,
    ) -> nn.Module:
        return build(**options)

    create.__name__ = name
    create.__module__ = module
    register_model(create)


def load_peer(path: Path) -> dict[str, Callable[..., nn.Module]]:
    """The models that a file registers, by name; the registry stays as it was."""
    tables = [value for value in vars(_registry).values() if isinstance(value, dict | set)]
    before = [table.copy() for table in tables]
    name = f"peer_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--peer {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where timm looks for what the file names
    known = dict(_registry._model_entrypoints)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are registered already
            spec.loader.exec_module(module)
        found = {
            model: create
            for model, create in _registry._model_entrypoints.items()
            if model.startswith("hornet_") and known.get(model) is not create
        }
    except (Exception, SystemExit) as error:
        raise UserError(f"--peer {path} cannot be imported: {error!r}") from None
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)  # type: ignore[arg-type]
    if not found:
        raise UserError(f"--peer {path} registers no hornet_* models with timm")
    return found
