"""Where the weights of a run come from: paths, addresses, published names; and how they fit."""

import logging
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from config import Config, FinetuneConfig, ModelConfig
from datasets import unnamed
from models import checkpoint_filter_fn, download, download_published, fit_head
from runtime import checkpoint
from runtime.distributed import DistributedContext, first_on_each_machine
from runtime.errors import UserError, near_names
from utils import is_like

logger = logging.getLogger(__name__)

NOT_OF_MODELS = frozenset(
    {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    | {"scriptable", "exportable", "no_jit", "num_classes"}
)
"""Arguments of timm.create_model that a checkpoint may not give."""


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
    hostile = set(known.get("model_kwargs") or {}) & NOT_OF_MODELS
    if hostile:  # these would have timm fetch or unpickle other files
        raise UserError(f"checkpoint {source}: its model_kwargs have {', '.join(sorted(hostile))}")
    if not isinstance(known.get("model"), str):
        raise UserError(f"checkpoint {source} does not name its model: give --model")
    for name, value in known.items():
        if not is_like(value, getattr(ModelConfig, name, {})):
            raise UserError(f"checkpoint {source}: its flag {name} is {value!r}")
    return ModelConfig(**known)


def load_start_weights(
    model: nn.Module, config: FinetuneConfig, classes: list[str], context: DistributedContext
) -> None:
    """Loads --finetune into `model`; raises UserError where more than the head does not fit."""
    path = local_file(config.finetune, context)
    state = checkpoint.read(path, model)
    found = checkpoint.find_weights(state, path, config.model_key, config.model_prefix)
    weights = checkpoint_filter_fn(_of_backbone(found), model)
    heads = heads_of(model)
    weights, done = fit_head(weights, len(classes), heads)
    may_lack = {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    known = state.get("classes")
    if not done and known and known != classes and unnamed(len(classes)) not in (known, classes):
        names = may_lack & weights.keys()
        if sorted(known) == sorted(classes):
            rows = torch.tensor([known.index(name) for name in classes])
            weights = weights | {name: weights[name][rows] for name in names}
            done = "the head's rows are put into the order of the data's classes"
        else:
            weights = {name: value for name, value in weights.items() if name not in names}
            done = f"the head starts anew: the file's classes are others ({known[0]}, ...)"
    if any(name.startswith("backbone.") for name in found):
        may_lack |= {"norm.weight", "norm.bias"}
        if not may_lack & weights.keys():
            done = "the norm and the head of the backbone start anew"
    checkpoint.load_weights(model, weights, path, frozenset(may_lack))
    logger.info("start weights from %s%s", path, f"; {done}" if done else "")


def _of_backbone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's part of a detector's or segmentor's weights, without the norms of its maps."""
    own = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    return {k: v for k, v in own.items() if not re.match(r"backbone\.norm\d", k)} or weights


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's last layers, mostly one."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def check_head(
    weights: dict[str, torch.Tensor], model: nn.Module, classes: list[str], path: str | Path
) -> None:
    """Refuses weights of another number of classes, where that can be told from their head."""
    bias = weights.get(f"{heads_of(model)[0]}.bias")
    if bias is not None and len(bias) != len(classes):
        raise UserError(f"checkpoint {path} has {len(bias)} classes, the data {len(classes)}")
