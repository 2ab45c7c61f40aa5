"""Reading and walking through configs of mmdet and mmseg."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from runtime.errors import UserError, near_names


def read_config(name: str, task: str = "") -> Any:
    """Return the config at a path, relative to the current folder or the project's folder `task`.

    Raises UserError if there is no such file, or it is broken or only a base of other configs.
    """
    from mmengine.config import Config

    path, root = Path(name), Path(__file__).resolve().parents[1]
    if not path.is_file():
        path = root / task / path
    if not path.is_file():
        ours = (root / task).glob("configs/[!_]*/*.py" if task else "*/configs/[!_]*/*.py")
        near = near_names(name, [str(file.relative_to(root / task)) for file in ours])
        also = f", nor in {task}/" if task else ""
        raise UserError(f"config {name} does not exist{also}{near}")
    import_quietly()
    try:
        config = Config.fromfile(path)
    except FileNotFoundError as error:
        raise UserError(
            f"config {path} cannot be read: {error.filename or error} is missing; a copy of a "
            "config needs its _base_ at the same place beside it"
        ) from None
    except Exception as error:  # a config is a program: it can raise anything
        raise UserError(f"config {path} cannot be read: {error!r}") from None
    if "model" not in config or "train_dataloader" not in config:
        raise UserError(f"config {path} is only a base of others: it lacks a model or its data")
    return config


def import_quietly() -> None:
    """Import what mmdet and mmseg register, without their remarks on packages not used here.

    Takes about four seconds the first time, so `need_stack`, which precedes --help, leaves it out.
    """
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmdet.datasets
        import mmdet.evaluation  # noqa: F401
        import mmseg.datasets
        import mmseg.visualization  # noqa: F401


@contextmanager
def formatted_once() -> Iterator[None]:
    """Within it, mmengine formats each text of a config once.

    Otherwise it does so for every log, checkpoint and file that holds it, up to 2 s each time.
    """
    from yapf.yapflib import yapf_api

    format_code, formatted = yapf_api.FormatCode, {}

    def format_new(text: str, **options: Any) -> Any:
        if text not in formatted:
            formatted[text] = format_code(text, **options)
        return formatted[text]

    yapf_api.FormatCode = format_new
    try:
        yield
    finally:
        yapf_api.FormatCode = format_code


def dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict in nested dicts, lists and tuples, including `value` itself."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from dicts(inner)
