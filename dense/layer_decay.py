"""Layer decay for mmengine: a learning rate per group of the backbone's layers."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from runtime.errors import UserError


def layer_ids(model: nn.Module, num_layers: int, decay_type: str) -> dict[str, int]:
    """Return the layer id of each parameter of a detector or segmentor, by name.

    layer_wise: those of the classifier (models.HorNet.group_matcher). stage_wise: 0 for the
    downsampling layers, i + 1 for stage i. Everything else, including the norms of the backbone's
    outputs, has num_layers + 1. Raises UserError for other decay types and backbones.
    """
    if decay_type not in ("layer_wise", "stage_wise"):
        raise UserError(f"decay_type {decay_type!r}: give layer_wise or stage_wise")
    backbone: Any = getattr(model, "backbone", None)
    if not hasattr(backbone, "group_matcher"):
        raise UserError("layer decay needs a model whose backbone is a HorNet")
    grouped = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    ids = dict.fromkeys(dict(model.named_parameters()), num_layers + 1)
    for name, layer in grouped.items():
        part, index, *_ = name.split(".")
        if part in ("downsample_layers", "stages"):
            by_stage = 0 if part == "downsample_layers" else int(index) + 1
            ids[f"backbone.{name}"] = layer if decay_type == "layer_wise" else by_stage
    return ids


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LearningRateDecayOptimizerConstructorHorNet(DefaultOptimWrapperConstructor):
    """Learning rates of decay_rate ** (num_layers + 1 - layer id) times the base rate.

    paramwise_cfg has num_layers, decay_rate, and decay_type: 'layer_wise' (default) or
    'stage_wise'. 1-D parameters and biases have no weight decay.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append the parameter groups of `module` to `params`, in order of first appearance."""
        num_layers = self.paramwise_cfg["num_layers"]
        ids = layer_ids(module, num_layers, self.paramwise_cfg.get("decay_type", "layer_wise"))
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            scale = self.paramwise_cfg["decay_rate"] ** (num_layers + 1 - ids[name])
            rates = {"lr": scale * self.base_lr, "lr_scale": scale}
            rates["weight_decay"] = self.base_wd if decays else 0.0
            new = {"params": [], "param_names": [], **rates}
            group = groups.setdefault((ids[name], decays), new)
            group["params"].append(parameter)
            group["param_names"].append(name)
        params.extend(groups.values())
