"""Other implementations of HorNet to compare with."""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from timm.models import _registry
from torch import nn

from runtime.errors import UserError

PLAIN = Path(__file__).with_name("plain_hornet.py")
Peers = dict[str, Callable[[], nn.Module]]


def load_peer(path: Path) -> Peers:
    """Return the models of a Python file by name: its MODELS, or what it registers with timm.

    timm's registry stays as it was.
    """
    name = f"peer_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--peer {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # register_model looks it up
    known = _registry._model_entrypoints
    tables: dict[str, Any] = {
        name: table.copy()
        for name, table in vars(_registry).items()
        if isinstance(table, dict | set) and not name.startswith("__")
    }
    try:
        with patch.multiple(_registry, **tables), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names that are registered already
            spec.loader.exec_module(module)
            found = getattr(module, "MODELS", None) or {
                model: create
                for model, create in _registry._model_entrypoints.items()
                if model.startswith("hornet_") and known.get(model) is not create
            }
    except (Exception, SystemExit) as error:
        raise UserError(f"--peer {path} cannot be imported: {error!r}") from None
    if not found:
        raise UserError(f"--peer {path} registers no hornet_* models with timm")
    return found
