"""Where the weights of a run come from: paths, addresses, published names; and how they fit."""

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from config import Config, FinetuneConfig, ModelConfig
from models import checkpoint_filter_fn, download, download_published, fit_head
from runtime import checkpoint
from runtime.distributed import DistributedContext, first_on_each_machine
from runtime.errors import UserError, near_names

logger = logging.getLogger(__name__)


def local_file(source: str | Path, context: DistributedContext) -> Path:
    """The checkpoint that a flag names, as a file: a path, an address, or published weights.

    What has to be fetched is put into torch.hub's cache, by one process of each machine. Raises
    UserError where it can't be had.
    """
    with first_on_each_machine(context):
        try:
            return _fetched(str(source))
        except RuntimeError as error:
            raise UserError(str(error)) from None


def _fetched(source: str) -> Path:
    if source.startswith(("https://", "http://")):
        return download(source)
    is_path = "/" in source or source.endswith((".pth", ".pt", ".safetensors"))
    if is_path or Path(source).exists():
        return Path(source)
    published = download_published(source)
    if published is None:
        names = timm.list_pretrained("hornet_*")
        raise UserError(
            f"there is neither a file nor published weights of the name {source}"
            f"{near_names(source, names)}"
        )
    return published


def with_model_of_weights(config: Config, context: DistributedContext) -> Config:
    """`--model auto` made the model that the checkpoint names which the run starts from."""
    if config.model.model != "auto":
        return config
    folder = checkpoint.RunFolder(config.checkpoint, context.is_main)
    source = folder.to_resume() or config.finetune.finetune
    if not source:
        raise UserError("--model auto needs weights that name it: give --finetune or --resume")
    path = local_file(source, context)
    saved = saved_model(source, checkpoint.saved_flags(checkpoint.read(path)))
    logger.info("model %s, as %s names it", saved.model, source)
    kwargs = saved.model_kwargs | config.model.model_kwargs
    return replace(config, model=replace(config.model, model=saved.model, model_kwargs=kwargs))


def saved_model(source: str, flags: dict[str, Any]) -> ModelConfig:
    """The model that a checkpoint was written for, by its name or the flags saved in it."""
    known = {f.name: flags[f.name] for f in fields(ModelConfig) if f.name in flags}
    if source in (*timm.list_pretrained("hornet_*"), *timm.list_models("hornet_*")):
        known["model"] = source.split(".")[0]
    if not isinstance(known.get("model"), str):
        raise UserError(f"checkpoint {source} does not name its model: give --model")
    return ModelConfig(**known)


def load_start_weights(
    model: nn.Module, config: FinetuneConfig, num_classes: int, context: DistributedContext
) -> None:
    """Loads --finetune into `model`; raises UserError where more than the head does not fit."""
    path = local_file(config.finetune, context)
    weights = checkpoint.find_weights(path, config.model_key, config.model_prefix)
    classifier = str(getattr(model, "pretrained_cfg", {}).get("classifier") or "head")
    weights, done = fit_head(checkpoint_filter_fn(weights, model), num_classes, classifier)
    may_lack = frozenset((f"{classifier}.weight", f"{classifier}.bias"))
    checkpoint.load_weights(model, weights, path, may_lack)
    logger.info("start weights from %s%s", path, f"; {done}" if done else "")
