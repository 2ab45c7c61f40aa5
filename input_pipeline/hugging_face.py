"""WORKAROUND: this project's datasets.py shadows Hugging Face's package `datasets`, which timm's
readers import."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def import_hugging_face_datasets() -> None:
    """Make `import datasets` import Hugging Face's package from here on; ImportError without it.

    Names imported from this project's module before stay valid. There is no way back, since the
    package's modules import each other lazily under this name.
    """
    own, path = sys.modules.get("datasets"), sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != ROOT]
    if getattr(own, "__file__", None) == str(ROOT / "datasets.py"):
        del sys.modules["datasets"]
    try:
        importlib.import_module("datasets")
    except ImportError:
        if own is not None:
            sys.modules["datasets"] = own
        raise
    finally:
        sys.path[:] = path
