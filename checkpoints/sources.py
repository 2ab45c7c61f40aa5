"""From a path, a URL or a published name to a file, and to the model it was made for."""

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import timm

from checkpoints.reading import (
    FOLDER_WEIGHTS,
    classes_in,
    flags_in,
    heads_of,
    is_multi_label,
    read_checkpoint,
    rows_in,
)
from checkpoints.run_folder import RunFolder
from config.flags import Config, DataConfig, ModelConfig
from models import download, download_published
from runtime.distributed import (
    SINGLE_PROCESS,
    DistributedContext,
    all_gather,
    first_on_each_machine,
)
from runtime.errors import UserError, near_names, reason_of
from utils import is_like

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint tells of its run.

    `classes` is empty if they have no names, `rows` is the number of classes of the head, 0 if that
    is not clear, `wandb_id` that of the run in Weights & Biases.
    """

    source: str
    classes: list[str]
    flags: dict[str, Any]
    rows: int = 0
    wandb_id: str = ""


REFUSED_ARGUMENTS = frozenset(
    {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    | {"scriptable", "exportable", "no_jit", "num_classes"}
)
"""Arguments of timm.create_model that a checkpoint may not give: some load or unpickle files."""


def local_file(source: str | Path, context: DistributedContext = SINGLE_PROCESS) -> Path:
    """Return the checkpoint that a flag names as a file; UserError if there is none.

    One process per machine downloads it, if necessary, into the cache of torch.hub, or of
    huggingface_hub for weights of timm.
    """
    source = str(source)
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme not in ("", "https", "http"):
        raise UserError(f"{source}: give a path, or an address that begins with https://")
    is_url = bool(scheme)
    is_path = "/" in source or source.endswith((".pth", ".pt", ".safetensors", ".h5"))
    with first_on_each_machine(context):
        try:
            if not is_url and (is_path or Path(source).exists()):
                return Path(source)
            if is_url:
                return download(source)
            fetched = download_published(source) or _download_of_timm(source)
        except RuntimeError as error:
            raise UserError(str(error)) from None
    if fetched is None:
        hint = near_names(source, timm.list_pretrained())
        raise UserError(f"there is neither a file nor published weights named {source}{hint}")
    return fetched


def _download_of_timm(name: str) -> Path | None:
    """Download weights that timm has published; None if there are none of this name."""
    cfg = timm.get_pretrained_cfg(name) if name in timm.list_pretrained() else None
    if cfg is None or not cfg.hf_hub_id:
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(cfg.hf_hub_id, FOLDER_WEIGHTS))
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{name} could not be downloaded ({reason_of(error)}): give a file of these weights"
        ) from None


def model_of(source: str, flags: dict[str, Any]) -> ModelConfig:
    """Return the model of a checkpoint, by its published name or the flags saved in it."""
    known = {f.name: flags[f.name] for f in fields(ModelConfig) if f.name in flags}
    if source in (*timm.list_pretrained("hornet_*"), *timm.list_models("hornet_*")):
        known["model"] = source.split(".")[0]
    refused = set(known.get("model_kwargs") or {}) & REFUSED_ARGUMENTS
    if refused:
        raise UserError(f"checkpoint {source}: its model_kwargs have {', '.join(sorted(refused))}")
    if not isinstance(known.get("model"), str):
        raise UserError(f"checkpoint {source} does not name its model: give --model")
    for name, value in known.items():
        is_known = name == "input_size" or is_like(value, getattr(ModelConfig, name, {}))
        if not is_known:
            raise UserError(f"checkpoint {source}: its flag {name} is {value!r}")
    try:
        return ModelConfig(**known)
    except ValueError as error:
        raise UserError(f"checkpoint {source}: {error}") from None


def continued(config: Config, context: DistributedContext) -> tuple[Config, SavedRun | None]:
    """Return the config, completed by the checkpoint that it evaluates or resumes, and the latter.

    `--model auto` becomes the model of that checkpoint, or of --finetune; evaluation images that
    are held out stay the same.
    """
    source = config.checkpoint.resume
    if not config.evaluation.eval:
        folder = RunFolder(config.checkpoint, context.is_main)
        source = all_gather(folder.to_resume() if context.is_main else "", context)[0]
    saved = _read_saved(source, config.model.model, context) if source else None
    if saved:
        config = replace(config, data=_as_before(config.data, saved))
        channels = saved.flags.get("in_chans") or 3
        if channels != config.data.in_chans:
            raise UserError(
                f"--in_chans is {config.data.in_chans}, {saved.source} was trained with {channels}"
            )
        _warn_of_changes(config, saved)
    if config.model.model != "auto":
        return config, saved
    start_from = config.finetune.finetune
    start = saved or (start_from and _read_saved(start_from, config.model.model, context))
    if not start:
        raise UserError("--model auto needs weights that name it: give --finetune or --resume")
    model = model_of(start.source, start.flags)
    logger.info("model %s, as %s names it", model.model, start.source)
    kwargs = model.model_kwargs | config.model.model_kwargs
    model = replace(config.model, model=model.model, model_kwargs=kwargs)
    return replace(config, model=model), saved


def _as_before(config: DataConfig, saved: SavedRun) -> DataConfig:
    """Return the data flags of a run that is continued, if it is older than some of them."""
    before: dict[str, Any] = {}
    if saved.flags.get("val_fraction"):
        before["val_choice"] = saved.flags.get("val_choice", "draw")
    is_own = saved.flags.get("data_set") in ("image_folder", "tar")
    if is_own and "exif_orientation" not in saved.flags:
        before |= {"exif_orientation": False, "background": "none"}
    for name, value in before.items():
        if getattr(config, name) != value:
            logger.info("--%s %s, as in the run of %s", name, value, saved.source)
    return replace(config, **before)


def _warn_of_changes(config: Config, saved: SavedRun) -> None:
    """Warn of flags by which results mean something else than those of the checkpoint's run."""
    flags, now = saved.flags, config.flat()
    kinds = ["any number of classes" if several else "one class"
             for several in (is_multi_label(flags), config.data.is_multi_label)]  # fmt: skip
    if kinds[0] != kinds[1]:
        logger.warning("%s was trained for %s per image, --data_set %s has %s", saved.source,
                       kinds[0], config.data.data_set, kinds[1])  # fmt: skip
    names = ["input_size", "crop_pct", "imagenet_default_mean_and_std", "value_range"]
    if flags.get("data_set") == now["data_set"]:
        names += ["exif_orientation", "background", "mean", "std"]
    for name in names if config.evaluation.eval else []:
        before = flags.get(name)
        if name == "input_size" and isinstance(before, list):
            before = before[0] if len({*before}) == 1 else before
        if name in flags and before != now[name]:
            logger.warning(
                "--%s is %s, %s was trained with %s", name, now[name], saved.source, flags[name]
            )
    same = all(flags.get(name) == now[name] for name in ("data_set", "data_path"))
    share = flags.get("val_fraction") if now["data_set"] == "image_folder" else None
    if share and same and share != now["val_fraction"]:
        logger.warning(
            "--val_fraction is %g, the run of %s held out %s: it has trained on some of the images "
            "that are evaluated", now["val_fraction"], saved.source, share,
        )  # fmt: skip


def _read_saved(source: str, model: str, context: DistributedContext) -> SavedRun:
    path = local_file(source, context)
    checkpoint = read_checkpoint(path, lazily=True)
    flags = flags_in(checkpoint)
    own = flags.get("model", "" if Path(source).exists() else source)
    name = own if model == "auto" else model
    (head, *_) = heads_of(timm.get_pretrained_cfg(str(name)) or {})
    return SavedRun(
        source,
        classes_in(checkpoint, path),
        flags,
        rows_in(checkpoint, head),
        str(checkpoint.get("wandb_id") or ""),
    )
