"""Parameter groups, optimizer, and schedules as pure functions of the step."""

import inspect
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from config.flags import OptimConfig, ScheduleConfig
from runtime.errors import UserError, near_names, some
from utils import is_like


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    decay_1d: bool = False,
    layer_decay_min: float = 0.0,
) -> list[dict[str, Any]]:
    """Return a group per layer id and weight decay, in order of first appearance, as the release.

    Without `decay_1d`, 1-D parameters and `model.no_weight_decay()` have no weight decay. A group's
    `lr_scale` is layer_decay ** (last id - id), at least layer_decay_min, with the ids of
    `model.group_matcher()`.
    """
    layer_ids: dict[str, int] = {}
    if layer_decay != 1.0:
        if not hasattr(model, "group_matcher"):
            raise UserError("--layer_decay: this model has no layer groups")
        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
        layer_ids = group_parameters(model, matcher, reverse=True)
    last_id = max(layer_ids.values(), default=0)
    without_decay: set[str] = getattr(model, "no_weight_decay", set)()

    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        has_axes = parameter.ndim > 1 and not name.endswith(".bias") and name not in without_decay
        decays = has_axes or decay_1d
        layer_id = layer_ids.get(name, last_id)
        decay = weight_decay if decays else 0.0
        scale = max(layer_decay_min, layer_decay ** (last_id - layer_id))
        new = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((layer_id, decays), new)["params"].append(parameter)
    return list(groups.values())


def freeze(model: nn.Module, pattern: str) -> int:
    """Freeze the parameters whose names begin with the regex `pattern`; return their number.

    Raises UserError if no parameter or all parameters match.
    """
    matching = [p for name, p in model.named_parameters() if re.match(pattern, name)]
    names = [name for name, _ in model.named_parameters()]
    if len(matching) in (0, len(names)):
        which = "all parameters begin" if matching else "no parameter begins"
        raise UserError(
            f"--freeze {pattern}: {which} with it; their names run from {names[0]} to {names[-1]}"
        )
    for parameter in matching:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in matching)


def create_optimizer(
    config: OptimConfig, model: nn.Module, lr: float, extra: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Create timm's optimizer of that name over `parameter_groups`.

    A Schedule sets the learning rate of each step; `lr` is the largest one. `extra` is trained
    beside the model, without layer decay.
    """
    names = [str(name) for name in list_optimizers()]
    if config.opt.lower().removeprefix("lookahead_") not in names:
        hint = near_names(config.opt, names)
        raise UserError(f"--opt {config.opt}: timm has no such optimizer{hint}")
    # a single kernel, which can skip a step without synchronisation
    fused = True if config.opt.lower() in ("adam", "adamw") else None
    options: dict[str, Any] = {"eps": config.opt_eps, "betas": config.opt_betas, "fused": fused}
    taken = {*inspect.signature(create_optimizer_v2).parameters, *options} & config.opt_args.keys()
    if taken:
        raise UserError(f"--opt_args: {some(sorted(taken))} is set here, or by a flag of its own")
    groups = parameter_groups(
        model, config.weight_decay, config.layer_decay, config.decay_1d, config.layer_decay_min
    )
    if extra is not None:
        groups += parameter_groups(extra, config.weight_decay)
    try:
        optimizer = create_optimizer_v2(
            groups,
            opt=config.opt,
            lr=lr,
            momentum=config.momentum,
            **{name: value for name, value in options.items() if value is not None},
            **config.opt_args,
        )
    except (ValueError, TypeError, AssertionError, IndexError, RuntimeError) as error:
        raise UserError(f"--opt {config.opt}: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {config.opt}: second-order optimizers are not supported")
    return optimizer


def half_cosine(progress: float) -> float:
    """Return 1 at progress 0, and 0 at progress 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of every optimizer step of a run."""

    config: ScheduleConfig
    weight_decay: float
    steps_per_epoch: int

    def __post_init__(self) -> None:
        run = f"the training ({self.config.epochs} epochs of {self.steps_per_epoch} steps)"
        if self.warmup > self.total_steps:
            raise UserError(
                f"warm-up is longer than {run}: lower --warmup_epochs or --warmup_steps"
            )
        if self.config.cooldown_epochs and self.warmup > self.end:
            raise UserError(
                f"warm-up and cooldown are longer than {run}: lower --warmup_epochs or "
                "--cooldown_epochs"
            )
        if self.config.sched == "wsd" and self.warmup + self.decay_steps > self.end:
            raise UserError(
                f"--sched wsd: warm-up, last phase and cooldown are longer than {run}: lower "
                "--warmup_epochs, --decay_epochs or --cooldown_epochs"
            )

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        return self.config.warmup(self.steps_per_epoch)

    @property
    def end(self) -> int:
        """The first step of the cooldown."""
        return self.total_steps - self.config.cooldown_epochs * self.steps_per_epoch

    @property
    def decay_steps(self) -> float:
        """Steps of --decay_epochs."""
        return (self.config.decay_epochs or self.config.epochs / 5) * self.steps_per_epoch

    def learning_rate(self, step: int, plateau: float = 1.0) -> float:
        """Return the rate at `step`, with the factor that `--sched plateau` has come to.

        Of the warm-up, step 0 has the rate 0, and the last step has --lr. Step `end` has --min_lr.
        """
        config, warmup = self.config, self.warmup
        if step >= self.end and config.cooldown_epochs:
            return config.min_lr
        if config.schedule_unit == "epoch":
            step = max(0, step // self.steps_per_epoch - 1) * self.steps_per_epoch
        if step < warmup:
            return config.lr * step / max(1, warmup - 1)
        progress = min(1.0, (step - warmup) / max(1, self.end - warmup))
        match config.sched:
            case "constant":
                return config.lr
            case "plateau":
                return max(config.min_lr, config.lr * plateau)
            case "step":
                steps = (step - warmup) // self.decay_steps
                return max(config.min_lr, config.lr * config.decay_rate**steps)
            case "wsd":  # 1 - sqrt: https://arxiv.org/abs/2405.18392
                phase = 1 - max(0, self.end - step) / self.decay_steps
                share = 1 - math.sqrt(max(0.0, phase))
            case "linear":
                share = 1 - progress
            case "cosine":
                share = half_cosine(progress)
        return config.min_lr + (config.lr - config.min_lr) * share

    def decay(self, step: int) -> float:
        """Return the weight decay at `step`, after a half cosine if --weight_decay_end is given."""
        end = self.config.weight_decay_end
        end = self.weight_decay if end is None else end
        share = half_cosine(min(1.0, step / max(1, self.total_steps)))
        return end + (self.weight_decay - end) * share

    def apply(self, optimizer: torch.optim.Optimizer, step: int, plateau: float = 1.0) -> None:
        """Set learning rates and weight decays of `step`; groups without weight decay stay so."""
        rate, decay = self.learning_rate(step, plateau), self.decay(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
            if group["weight_decay"] > 0:
                group["weight_decay"] = decay


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], options: Collection[str] = ()
) -> None:
    """Restore the state of an optimizer.

    Hyperparameters that have flags, or are named in `options`, stay as they are.

    Raises ValueError, KeyError, TypeError, ... if the state doesn't fit, or is damaged.
    """
    parameters: dict[Any, nn.Parameter] = {}
    have_flags = {"lr", "lr_scale", *options} | {
        f.name.removeprefix("opt_") for f in fields(OptimConfig)
    }
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        parameters |= zip(group["params"], own["params"], strict=True)
        group |= {"fused": own["fused"]} if "fused" in own else {}  # missing in older files
        for name in own.keys() & group.keys() - {"params"}:
            if not is_like(group[name], own[name]):
                raise ValueError(f"its {name} is {group[name]!r}")
            # other numbers may be estimates that the optimizer keeps, so the checkpoint's stay
            if name in have_flags or type(own[name]) not in (int, float):
                group[name] = own[name]
    for index, values in saved["state"].items():
        if not isinstance(values, dict):
            raise ValueError("its state is damaged")
        is_adam = isinstance(optimizer, torch.optim.Adam)
        if is_adam and not {"exp_avg", "exp_avg_sq"} <= values.keys():
            raise ValueError("its state is incomplete")
        for name in {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"} & values.keys():
            value = torch.as_tensor(values[name])
            shape = () if name == "step" else parameters[index].shape
            if (is_adam and value.shape != shape) or not value.isfinite().all():
                raise ValueError(f"its {name} is damaged")
    needed = set(optimizer.param_groups[0])
    optimizer.load_state_dict(saved)  # which adds options that older versions of torch didn't have
    if any(needed - group.keys() for group in optimizer.param_groups):
        raise ValueError("its options have other names")
