"""Other implementations of HorNet to compare with."""

import runpy
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
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--peer {path} is not a Python file")
    known = _registry._model_entrypoints
    tables: dict[str, Any] = {
        name: table.copy()
        for name, table in vars(_registry).items()
        if isinstance(table, dict | set) and not name.startswith("__")
    }
    try:
        with patch.multiple(_registry, **tables), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names that are registered already
            found = runpy.run_path(str(path), run_name=f"peer_{path.stem}").get("MODELS") or {
                model: create
                for model, create in _registry._model_entrypoints.items()
                if model.startswith("hornet_") and known.get(model) is not create
            }
    except (Exception, SystemExit) as error:
        raise UserError(f"--peer {path} cannot be imported: {error!r}") from None
    if not found:
        raise UserError(f"--peer {path} registers no hornet_* models with timm")
    return found
