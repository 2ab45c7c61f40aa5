"""WORKAROUND for a name that two modules have: `datasets`, this project's and Hugging Face's.

timm's readers import Hugging Face's package by that name, which this project's datasets.py shadows.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def import_hugging_face_datasets() -> None:
    """Makes `import datasets` mean Hugging Face's package from here on.

    What was imported from this project's module stays as it is; the parts of the package import
    each other under that name for as long as they live.

    Raises:
        ImportError: the package is not installed.
    """
    own, path = sys.modules.get("datasets"), sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != ROOT]
    is_own = getattr(own, "__file__", None) == str(ROOT / "datasets.py")
    if is_own:
        del sys.modules["datasets"]
    try:
        importlib.import_module("datasets")
    except ImportError:
        if own is not None:
            sys.modules["datasets"] = own
        raise
    finally:
        sys.path[:] = path
