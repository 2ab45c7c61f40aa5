"""Every flag, once: frozen sections, how they are parsed, and how they are saved.

A flag is a field below and is written `--name value`; the docstring under it is its help text.
Precedence: defaults < recipe (`--config FILE.yaml`) < command line, wherever `--config` stands.
"""

import difflib
import math
import re
import sys
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from runtime.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = "hornet_tiny_gf"
    """Name of a registered model: the HorNets of models/variants.py, or any other of timm."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    input_size: int = 224
    """Height and width of the images fed to the network, in pixels."""
    layer_scale_init_value: float = 1e-6
    """Initial value of the layer scale (HorNet models)."""
    head_init_scale: float = 1.0
    """Factor on the initial weights of the classifier (HorNet models)."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model, such as '{"base_dim": 32}'."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Start weights"""

    finetune: str = ""
    """Weights to start from: a .pth of this project or of the release, or .safetensors. Global
    filters are resized; a head of another class count is replaced; all else has to fit."""
    model_key: str = "model|module"
    """Entries of the file to look for the weights in, tried in turn; else the file itself."""
    model_prefix: str = ""
    """What the names of the weights begin with in the file, to be cut off."""


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    data_set: Literal["IMNET", "image_folder", "digits"] = "IMNET"
    """IMNET: data_path holds train/ and val/ with the 1000 classes of ImageNet. image_folder:
    data_path and eval_data_path hold one folder a class. digits: scikit-learn's handwritten
    digits, written to data_path as image folders when they are not there."""
    data_path: str = "/path/to/dataset"
    """Folder of the data set."""
    eval_data_path: str | None = None
    """Folder of the evaluation images (image_folder only); if not given, data_path has to hold
    train/ and val/."""
    batch_size: int = 64
    """Images a process and micro-batch. Evaluation uses one and a half times as many."""
    num_workers: int = 10
    """Loader processes for each training process; 0 loads in the training process itself."""
    pin_mem: bool = True
    """Page-locked host memory for faster copies to a GPU."""
    imagenet_default_mean_and_std: bool = True
    """Normalise by ImageNet's mean and deviation; otherwise by 0.5 and 0.5, as Inception does."""
    nb_classes: int = 1000
    """Unused, as in the original release: the data set tells the number of its classes."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation"""

    scale: tuple[float, float] | None = None
    """Area of the random crop as a share of the image. If not given: 0.08 1 for inputs of more
    than 32 pixels; smaller inputs are padded by 4 and cropped without a change of scale."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.4
    """Strength of the colour jitter; timm uses it only where aa is none."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy in timm's notation, or none."""
    train_interpolation: Literal[
        "bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random"
    ] = "bicubic"
    """Interpolation of resized training images; random draws bilinear or bicubic."""
    crop_pct: float | None = None
    """Share of the evaluation image's short side that the centre crop keeps; 224/256 if not
    given. Inputs of 384 pixels and more are warped to the square instead."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What fills an erased rectangle."""
    recount: int = 1
    """Number of rectangles erased at most."""
    smoothing: float = 0.1
    """Label smoothing."""


@dataclass(frozen=True)
class MixupConfig:
    """Mixup and CutMix"""

    mixup: float = 0.8
    """Alpha of mixup; 0 switches it off."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 switches it off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Bounds of the cut's side as shares of the image; they switch CutMix on, without alpha."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Whether the mixing is drawn once a batch, once a pair, or once an image."""

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    opt: str = "adamw"
    """Optimizer, by its name in timm."""
    opt_eps: float | None = 1e-8
    """Epsilon of the optimizer."""
    opt_betas: tuple[float, ...] | None = None
    """Betas of the optimizer, written `--opt_betas 0.9 0.95`; its own default if not given."""
    momentum: float = 0.9
    """Momentum of optimizers that have one."""
    weight_decay: float = 0.05
    """Weight decay; 1-D parameters (norms, biases, layer scale) have none."""
    update_freq: int = 1
    """Micro-batches whose gradients are accumulated for one optimizer step."""
    clip_grad: float | None = None
    """Largest 2-norm of the gradient; no clipping if not given."""
    clip_mode: Literal["step", "micro"] = "step"
    """step: clip the whole accumulated gradient once a step. micro: clip the running sum after
    every micro-batch, as the original release did in float32."""
    layer_decay: float = 1.0
    """Factor on the learning rate from one layer group to the one before it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule"""

    epochs: int = 300
    """Passes over the training images."""
    start_epoch: int = 0
    """Epoch to start from, counted from 0; a resumed checkpoint overrides it."""
    lr: float = 4e-3
    """Learning rate after the warm-up, for the total batch as it is (it is not scaled)."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: int = 20
    """Epochs of linear warm-up from 0."""
    warmup_steps: int = -1
    """Optimizer steps of warm-up; overrides warmup_epochs where it is positive."""
    weight_decay_end: float | None = None
    """Weight decay at the end of its cosine; constant if not given."""

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.epochs * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Warm-up in optimizer steps."""
        return self.warmup_steps if self.warmup_steps > 0 else self.warmup_epochs * steps_per_epoch


@dataclass(frozen=True)
class EmaConfig:
    """Weight averaging"""

    model_ema: bool = False
    """Keep an exponential moving average of the weights."""
    model_ema_decay: float = 0.9999
    """Decay of the average at each optimizer step."""
    model_ema_force_cpu: bool = False
    """Keep the average in host memory."""
    model_ema_eval: bool = False
    """Evaluate the average beside the model."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    output_dir: str = ""
    """Folder of checkpoints, log.txt, config.yaml and curves.png; nothing is saved without it."""
    resume: str = ""
    """Checkpoint to continue from, or to evaluate with `--eval true`."""
    auto_resume: bool = True
    """Continue from the newest checkpoint of output_dir, if there is one."""
    save_ckpt: bool = True
    """Save checkpoints."""
    save_ckpt_freq: int = 1
    """Epochs from one checkpoint to the next."""
    save_ckpt_num: int = 3
    """Numbered checkpoints kept, beside those of epochs 50, 100, 150, ..."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    eval: bool = False
    """Evaluate the checkpoint given by resume, and exit."""
    dist_eval: bool = True
    """Share the evaluation among the processes; each image counts once in either case."""
    disable_eval: bool = False
    """Train without evaluating."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_dir: str | None = None
    """Folder of the TensorBoard events; none are written if not given."""
    log_interval: int = 10
    """Optimizer steps from one log line to the next."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Machine"""

    device: str = "auto"
    """auto (a GPU if there is one), cuda or cpu."""
    seed: int = 0
    """Seed of every random number."""
    use_amp: bool = False
    """Mixed precision: convolutions and matrix products in amp_dtype."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Type of mixed precision; float16 scales the loss, and skips steps that overflow."""
    local_rank: int = -1
    """Set by torch.distributed.launch; the environment's LOCAL_RANK goes before it."""
    world_size: int = 1
    """Processes of a run that srun starts, with ranks from SLURM_PROCID; torchrun tells its own."""
    dist_url: str = "env://"
    """Where processes meet: env:// (MASTER_ADDR and MASTER_PORT), tcp://HOST:PORT or file://PATH."""
    dist_on_itp: bool = False
    """Ranks from Open MPI (OMPI_COMM_WORLD_RANK, _SIZE and _LOCAL_RANK)."""


@dataclass(frozen=True)
class Config:
    """All sections. The command line and a recipe name the fields, never the sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def total_batch(self, processes: int) -> int:
        """Images of one optimizer step."""
        return self.data.batch_size * self.optim.update_freq * processes

    def flat(self) -> dict[str, Any]:
        """Every flag with its value, as plain values that YAML and a checkpoint can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for section in asdict(self).values()
            for name, value in section.items()
        }

    def save(self, path: str | Path) -> None:
        """Writes the flags as a recipe, which `--config` reads back."""
        Path(path).write_text(yaml.safe_dump(self.flat(), sort_keys=False))


SECTIONS: dict[str, type] = {f.name: f.type for f in fields(Config)}  # type: ignore[misc]


def parse_args(argv: list[str] | None = None) -> Config:
    """The command line (`sys.argv[1:]` if not given) as a checked Config.

    Raises UserError for an unknown flag, a value of the wrong type or range, or a bad recipe.
    """
    return parse_args_with(argv)[0]


def parse_args_with(argv: list[str] | None = None, *extra: type) -> tuple[Config, list[Any]]:
    """As `parse_args`, with the sections that another program adds; returns those beside."""
    sections = [*SECTIONS.values(), *extra]
    flags = {f.name: f for section in sections for f in fields(section)}
    argv = _published_spellings(sys.argv[1:] if argv is None else argv, flags)
    try:
        flat = _parser(sections).parse_args(argv)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), flags)) from None
    built = [section(**{f.name: flat[f.name] for f in fields(section)}) for section in sections]
    config = Config(*built[: len(SECTIONS)])
    _check(config)
    return config, built[len(SECTIONS) :]


def _parser(sections: list[type]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Recipe: a YAML file of flags.")
    for section in sections:
        parser.add_class_arguments(section)
    return parser


_BOOLEANS = {"t": "true", "y": "true", "1": "true", "f": "false", "n": "false", "0": "false"}


def _published_spellings(argv: list[str], flags: dict[str, Field]) -> list[str]:
    """Rewrites spellings of published commands and launchers into those that the parser takes.

    `--local-rank=0` -> `--local_rank=0`, `--model_ema t` -> `--model_ema=true`,
    `--use_volta32` -> `--use_volta32=true`, `--opt_betas 0.9 0.95` -> `--opt_betas=[0.9,0.95]`,
    `--aa none` -> `--aa=null`; `--config` moves to the front, so that the command line overrides
    it.
    """
    configs: list[str] = []
    rewritten: list[str] = []
    position = 0
    while position < len(argv):
        name, equals, value = argv[position].partition("=")
        position += 1
        if not name.startswith("--"):
            rewritten.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and position < len(argv) and _is_value(argv[position]):
            values.append(argv[position])
            position += 1
        name = "--" + name[2:].replace("-", "_")
        target = configs if name == "--config" else rewritten
        target += _spelled(name, values, flags)
    return configs + rewritten


def _is_value(token: str) -> bool:
    return not token.startswith("-") or re.match(r"-[\d.]", token) is not None


def _spelled(name: str, values: list[str], flags: dict[str, Field]) -> list[str]:
    flag = flags.get(name[2:])
    kind = str(flag.type) if flag else ""
    if "bool" in kind and len(values) <= 1:
        value = values[0].lower() if values else "true"
        return [f"{name}={_BOOLEANS.get(value, value)}"]
    if "tuple" in kind and values and not values[0].startswith("["):
        return [f"{name}=[{','.join(values)}]" if values != ["null"] else f"{name}=null"]
    if name == "--aa" and values and values[0].lower() in ("none", ""):
        return [f"{name}=null"]
    if len(values) == 1:
        return [f"{name}={values[0]}"]
    return [name, *values]


def _one_line(message: str, flags: dict[str, Field]) -> str:
    """jsonargparse's message, of many lines, as one that names the flag and what it takes."""
    message = " ".join(message.split())
    unknown = re.search(r"arguments: --([\w.]+)|Option '(\w+)' is not accepted", message)
    if unknown:
        name = unknown[1] or unknown[2]
        near = difflib.get_close_matches(name, [*flags, "config"], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        return f"there is no flag {name}{hint}"
    value = re.match(r'Parser key "(\w+)":.*(?:Got value|Given value): (.*)', message)
    if value and value[1] in flags:
        kind = flags[value[1]].type
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        return f"--{value[1]} {value[2]}: expected {expected}"
    return re.sub(r'^Parser key "(\w+)": ', r"--\1: ", message)


# the smallest and the largest value of a flag
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "input_size", "epochs", "update_freq"), (1, math.inf)),
    **dict.fromkeys(("save_ckpt_freq", "save_ckpt_num", "log_interval"), (1, math.inf)),
    **dict.fromkeys(("num_workers", "seed", "start_epoch", "warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("lr", "min_lr", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("color_jitter", "mixup", "cutmix", "opt_eps"), (0, math.inf)),
    **dict.fromkeys(("reprob", "hflip", "mixup_prob", "mixup_switch_prob"), (0, 1)),
    **dict.fromkeys(("model_ema_decay", "momentum"), (0, 1)),
    **dict.fromkeys(("drop_path", "smoothing"), (0, 0.99)),
    "recount": (1, 100),
    "layer_decay": (1e-3, 1),
    "crop_pct": (0.01, 1),
}


def _check(config: Config) -> None:
    """Refuses values that parse but cannot work; each message names the flag to change."""
    flat = config.flat()
    for name, (least, most) in _BOUNDS.items():
        value = flat[name]
        if value is not None and not least <= value <= most:
            span = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UserError(f"--{name} {value}: has to be {span}")
    for name in ("scale", "ratio", "cutmix_minmax"):
        if flat[name] and not 0 < flat[name][0] <= flat[name][1]:
            raise UserError(f"--{name} {flat[name]}: give the smaller number first, above 0")
    if flat["opt_betas"] is not None and len(flat["opt_betas"]) < 2:
        raise UserError("--opt_betas: give two numbers or more, such as --opt_betas 0.9 0.95")
    if flat["clip_grad"] is not None and flat["clip_grad"] <= 0:
        raise UserError("--clip_grad has to be above 0; leave it out to train without clipping")
    if config.mixup.enabled and flat["batch_size"] % 2 and not flat["eval"]:
        raise UserError(f"--batch_size {flat['batch_size']}: mixup pairs images, make it even")
    if flat["use_amp"] and flat["amp_dtype"] == "float16" and flat["clip_mode"] == "micro":
        raise UserError(
            "--clip_mode micro cannot see through the scaled loss of --amp_dtype float16"
        )
    if flat["model_ema_eval"] and not (flat["model_ema"] or flat["eval"]):
        raise UserError("--model_ema_eval true needs --model_ema true: there is no average to test")
    if flat["eval"] and not flat["resume"]:
        raise UserError("--eval true needs a checkpoint: give --resume PATH")
