"""The command line: argv and recipes -> a checked Config.

Precedence: defaults < recipe (`--config FILE.yaml`) < command line, wherever `--config` stands.
"""

import difflib
import json
import os
import re
import sys
from dataclasses import Field, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from PIL import ImageColor

from config.flags import TTA, Config, sections_of
from runtime.errors import UserError, near_names, reason_of


class _Help(DefaultHelpFormatter):
    def _expand_help(self, action: Any) -> str:
        """Write `Annotated[int, at least 1]` as `int, at least 1`."""
        text = super()._expand_help(action)
        return re.sub(r"(?:Optional\[)?Annotated\[(.+?), ((?:at|from) [^\]]+)\]+", r"\1, \2", text)


def parse_args(argv: list[str] | None = None) -> Config:
    """Parse `sys.argv[1:]` or `argv`; UserError for a wrong flag, type, range or recipe."""
    return parse_args_with(argv)[0]


def parse_args_with(
    argv: list[str] | None = None, *extra: type, kind: type[Config] = Config
) -> tuple[Any, list[Any]]:
    """Like `parse_args`, for another program.

    Its config may be of another `kind`, with further sections; `extra` sections are returned
    beside it.
    """
    own = sections_of(kind)
    sections = [*own.values(), *extra]
    flags = {f.name: f for section in sections for f in fields(section)}
    recipes, argv = _published_spellings(sys.argv[1:] if argv is None else argv, flags)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=__doc__, exit_on_error=False, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--config", action="config", help="Recipe: a YAML file of flags.")
    for section in sections:
        parser.add_class_arguments(section)
    try:
        flat = _parse(parser, [*chain(*recipes.values()), *argv], flags)
    except UserError:
        for path, of_recipe in recipes.items():
            try:
                _parse(parser, of_recipe, flags)
            except UserError as error:
                raise UserError(f"--config {path}: {error}") from None
        raise
    for name, value in flat.items():
        if isinstance(value, str) and value.startswith("~"):  # recipes are not expanded by a shell
            flat[name] = os.path.expanduser(value)
    built = [section(**{f.name: flat[f.name] for f in fields(section)}) for section in sections]
    config = kind(**dict(zip(own, built, strict=False)))
    _check(config)
    _check_needs(config.flat(), {arg.partition("=")[0][2:] for arg in argv})
    return config, built[len(own) :]


def _parse(parser: ArgumentParser, argv: list[str], flags: dict[str, Field]) -> Any:
    try:
        flat = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), flags)) from None
    for name, flag in flags.items():
        for bound in getattr(flag.type, "__metadata__", ()):
            value = flat[name]
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(bound.low <= n <= bound.high for n in numbers):
                raise UserError(f"--{name} {flat[name]}: has to be {bound}")
    return flat


_BOOLEANS = {"t": "true", "y": "true", "1": "true", "f": "false", "n": "false", "0": "false"}


def _published_spellings(
    argv: list[str], flags: dict[str, Field]
) -> tuple[dict[str, list[str]], list[str]]:
    """Rewrite the spellings of published commands, launchers and recipes for jsonargparse.

    Return the flags of each recipe, by its path, and those of the command line.

    `--local-rank=0` -> `--local_rank=0`, `--model_ema t` -> `--model_ema=true`,
    `--use_volta32` -> `--use_volta32=true`, `--opt_betas 0.9 0.95` -> `--opt_betas=[0.9,0.95]`,
    `--aa none` -> `--aa=null`.
    """
    recipes: dict[str, list[str]] = {}
    rewritten: list[str] = []
    rest = [*argv]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            rewritten.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and rest and re.match(r"(?!-)|-[\d.]", rest[0]):  # no flag, but e.g. -1
            values.append(rest.pop(0))
        name = "--" + name[2:].replace("-", "_")
        if name == "--config" and len(values) == 1:
            recipes[values[0]] = _flags_of_recipe(values[0], flags)
        else:
            rewritten += _spelled(name, values, flags)
    return recipes, rewritten


def _flags_of_recipe(
    path: str, flags: dict[str, Field], builds: tuple[Path, ...] = ()
) -> list[str]:
    """Return a recipe as arguments; UserError, with the path, if one of them is wrong.

    `builds` are the recipes that build on it.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text())
    except OSError as error:
        own = Path(__file__).parents[1]
        known = [str(file.relative_to(own)) for file in own.glob("recipes/**/*.yaml")]
        near = near_names(path, known) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"--config {path} cannot be read: {error.strerror}{near}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes, dates
        reason = reason_of(error)
        raise UserError(f"--config {path}: a recipe is a YAML file of flags: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a recipe is a YAML file of flags, as in 'epochs: 30'")
    rewritten: list[str] = []
    own = Path(path).expanduser().resolve()
    for base in _bases(content.pop("base", []), own):
        if Path(base).resolve() in (*builds, own):
            raise UserError(f"--config {path}: base: {base} builds on this recipe itself")
        rewritten += _flags_of_recipe(base, flags, (*builds, own))
    for name, value in content.items():
        name = str(name).replace("-", "_")
        if name not in flags:
            raise UserError(f"--config {path}: {_unknown(name, flags)}")
        if value is None and not _may_be_none(flags[name]):
            raise UserError(f"--config {path}: {name} has no value")
        plain = value is None or isinstance(value, bool | int | float | list | dict)
        text = json.dumps(value) if plain else str(value)
        many = "tuple" in str(flags[name].type) and not text.startswith("[")
        rewritten += _spelled(f"--{name}", text.split() if many else [text], flags)
    return rewritten


def _may_be_none(flag: Field) -> bool:
    return "None" in str(flag.type) or "Optional" in str(flag.type)


def _bases(names: Any, path: Path) -> list[str]:
    """Return the recipes that one builds on; they are named relative to it."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"--config {path}: base: give the name of a recipe, or a list of names")
    return [str(path.parent / Path(name).expanduser()) for name in names]


def _spelled(name: str, values: list[str], flags: dict[str, Field]) -> list[str]:
    flag = flags.get(name[2:])
    kind = str(flag.type) if flag else ""
    if "bool" in kind and len(values) <= 1:
        value = values[0].lower() if values else "true"
        return [f"{name}={_BOOLEANS.get(value, value)}"]
    if (
        "tuple" in kind
        and not ("int |" in kind and len(values) == 1)
        and values
        and not values[0].startswith("[")
    ):
        return [f"{name}=[{','.join(values)}]" if values != ["null"] else f"{name}=null"]
    if name == "--aa" and values and values[0].lower() in ("none", ""):
        return [f"{name}=null"]
    return [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]


def _unknown(name: str, flags: dict[str, Field]) -> str:
    near = difflib.get_close_matches(name, [*flags, "config"] if name != "config" else flags, n=1)
    return f"there is no flag {name}; {f'did you mean {near[0]}?' if near else 'see --help'}"


def _one_line(message: str, flags: dict[str, Field]) -> str:
    """Return jsonargparse's error as one line that names the flag and the expected type."""
    message = " ".join(message.split())
    unknown = re.search(r"arguments: --([\w.]+)", message)
    if unknown:
        return _unknown(unknown[1], flags)
    value = re.match(r'Parser key "(\w+)":.*(?:Got value|Given value): (.*)', message)
    if value and value[1] in flags:
        kind: Any = flags[value[1]].type
        kind = kind.__origin__ if hasattr(kind, "__metadata__") else kind
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        if "tuple" in expected:
            expected = "numbers" if "..." in expected else "two numbers"
            expected = "a number, or two as in 224 320" if value[1] == "input_size" else expected
        if "Literal" in expected:
            expected = "one of " + ", ".join(re.findall(r"'(\w+)'", expected))
        return f"--{value[1]} {value[2]}: expected {expected}"
    return re.sub(r'^Parser key "(\w+)": ', r"--\1: ", message)


def _check(config: Config) -> None:
    """Refuse combinations of values that cannot work; each message names the flag to change."""
    flat = config.flat()
    for name in ("scale", "ratio", "cutmix_minmax"):
        if flat[name] and not 0 < flat[name][0] <= flat[name][1]:
            raise UserError(f"--{name} {flat[name]}: give the smaller number first, above 0")
    if flat["cutmix_minmax"] and flat["cutmix_minmax"][1] > 1:
        raise UserError(f"--cutmix_minmax {flat['cutmix_minmax']}: fractions, at most 1")
    if flat["background"] != "none":
        try:
            ImageColor.getrgb(flat["background"])
        except ValueError:
            raise UserError(
                f"--background {flat['background']}: give a colour such as white or '#808080', or "
                "none"
            ) from None
    try:
        re.compile(flat["freeze"])
    except re.error as error:
        raise UserError(f"--freeze {flat['freeze']}: not a regular expression ({error})") from None
    if flat["opt_betas"] is not None and len(flat["opt_betas"]) < 2:
        raise UserError("--opt_betas: give at least two numbers, as in --opt_betas 0.9 0.95")
    if flat["clip_grad"] is not None and flat["clip_grad"] <= 0:
        raise UserError("--clip_grad has to be above 0; leave it out for no clipping")
    if config.mixup.enabled and flat["batch_size"] % 2 and not flat["eval"]:
        raise UserError(f"--batch_size {flat['batch_size']}: mixup pairs images, make it even")
    if flat["use_amp"] and flat["amp_dtype"] == "float16" and flat["clip_mode"] == "micro":
        raise UserError("--clip_mode micro can't clip the scaled gradients of --amp_dtype float16")
    if flat["memory"] == "lean" and flat["grad_checkpointing"]:
        raise UserError("--memory lean and --grad_checkpointing true: choose one of them")
    if config.data.is_multi_label:
        _check_multi_label(config)
    _check_channels(config)
    if flat["class_weights"] and flat["loss"] == "focal":
        raise UserError("--class_weights: --loss focal has its own, --focal_alpha")
    if flat["focal_alpha"] < 0 and flat["focal_alpha"] != -1:
        raise UserError(f"--focal_alpha {flat['focal_alpha']}: from 0 to 1, or -1 for no weights")
    if flat["schedule_unit"] == "epoch" and flat["sched"] != "cosine":
        raise UserError(f"--schedule_unit epoch is P2P's, for cosine: --sched {flat['sched']}?")
    if flat["sched"] == "plateau" and flat["disable_eval"]:
        raise UserError("--sched plateau needs evaluations: give --disable_eval false")
    if len({*flat["model_ema_more"]}) < len(flat["model_ema_more"]):
        raise UserError(f"--model_ema_more {flat['model_ema_more']}: a decay occurs twice")
    if not all(0 <= decay <= 1 for decay in flat["model_ema_more"]):
        raise UserError(f"--model_ema_more {flat['model_ema_more']}: decays are from 0 to 1")
    if flat["model_ema_eval"] and not (flat["model_ema"] or flat["eval"]):
        raise UserError("--model_ema_eval true needs --model_ema true")
    if not flat["save_frozen"] and not flat["finetune"] and not flat["eval"]:
        raise UserError("--save_frozen false needs --finetune, to read the frozen weights from")
    if not flat["save_frozen"] and flat["model_ema"]:
        raise UserError("--save_frozen false: the EMA has all weights; give --model_ema false")
    if flat["eval"] and flat["smoke"]:
        raise UserError("--smoke true is for training; shrink an evaluation by --max_images N")
    if flat["compile"] and (flat["size_schedule"] or "scales" in flat["tta"]):
        raise UserError(
            "--compile true: images of other sizes fail to compile: leave out --size_schedule and "
            "--tta scales"
        )
    if flat["size_schedule"]:
        _check_sizes(config)
    for view in flat["tta"]:
        if view not in TTA:
            raise UserError(f"--tta {view}: give some of {', '.join(TTA)}")
    for name in ("real_labels", "results_file", "tta"):
        if flat[name] and not flat["eval"]:
            raise UserError(f"--{name} needs --eval true")
    if flat["eval"] and not flat["resume"]:
        raise UserError("--eval true needs a checkpoint: give --resume PATH")


def _check_needs(flat: dict[str, Any], given: set[str]) -> None:
    """Refuse flags `given` on the command line that would have no effect.

    Recipes may have them: config.yaml of a run has all flags.
    """
    sched = flat["sched"]
    learns = "--teacher", bool(flat["teacher"])
    focal, has_ema = (
        ("--loss focal", flat["loss"] == "focal"),
        ("--model_ema true", flat["model_ema"]),
    )
    needs = {
        "bce_target_thresh": ("--loss bce", flat["loss"] == "bce"),
        "focal_gamma": focal,
        "focal_alpha": focal,
        "distill": learns,
        "distill_alpha": learns,
        "distill_temperature": (
            "--teacher and --distill soft",
            learns[1] and flat["distill"] == "soft",
        ),
        "decay_epochs": ("--sched wsd or step", sched in ("wsd", "step")),
        "decay_rate": ("--sched step or plateau", sched in ("step", "plateau")),
        "patience_epochs": ("--sched plateau", sched == "plateau"),
        "layer_decay_min": ("--layer_decay below 1", flat["layer_decay"] < 1),
        "model_ema_more": has_ema,
        "model_ema_warmup": has_ema,
    }
    defaults = Config().flat()
    for name, (what, is_met) in needs.items():
        if name in given and flat[name] != defaults[name] and not is_met:
            raise UserError(f"--{name} {flat[name]} needs {what}")


def _check_channels(config: Config) -> None:
    data = config.data
    if (data.mean is None) != (data.std is None):
        raise UserError("--mean and --std go together")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) not in (1, data.in_chans):
            raise UserError(f"--{name}: {len(values)} numbers for --in_chans {data.in_chans}")
    if data.mean is not None and not all(0 <= mean <= 1 for mean in data.mean):
        raise UserError(f"--mean {data.mean}: has to be from 0 to 1, as the values are")
    if data.std is not None and not all(0 < std <= 1 for std in data.std):
        raise UserError(f"--std {data.std}: has to be above 0, and at most 1")
    if data.value_range is not None and not data.value_range[0] < data.value_range[1]:
        raise UserError(f"--value_range {data.value_range}: give the smaller number first")
    if not data.as_arrays:
        return
    what = f"--in_chans {data.in_chans}" if data.in_chans != 3 else "--value_range"
    if data.data_set not in ("IMNET", "image_folder", "digits", "tar", "multi_label"):
        raise UserError(f"{what}: --data_set {data.data_set} has 8-bit RGB images")
    augment = config.augment
    if config.evaluation.eval:
        return
    if augment.aa is not None or augment.color_jitter:
        raise UserError(
            f"{what}: colours of such images are not augmented: give --aa none --color_jitter 0"
        )
    if augment.fast_decode:
        raise UserError(f"{what}: --fast_decode true is for 8-bit RGB images")
    if augment.train_interpolation not in ("bicubic", "bilinear", "nearest"):
        raise UserError(f"{what}: --train_interpolation bicubic, bilinear or nearest")


def _check_multi_label(config: Config) -> None:
    """Refuse what needs a single label per image."""
    what, flat = "--data_set multi_label", config.flat()
    single = (
        ("class_weights", flat["class_weights"] == "balanced"),
        ("real_labels", flat["real_labels"]),
        ("results_file", flat["results_file"]),
        ("class_balanced", flat["class_balanced"]),
        ("val_fraction", flat["val_fraction"]),
        ("teacher", flat["teacher"] and flat["distill"] != "features"),
    )
    for name, is_on in single:
        if is_on:
            raise UserError(f"{what}: --{name} {flat[name]} is for images of one class each")
    if flat["eval"]:
        return
    if config.mixup.enabled:
        raise UserError(f"{what}: images are not mixed: give --mixup 0 --cutmix 0")
    if flat["loss"] == "cross_entropy":
        raise UserError(f"{what}: give --loss bce or focal")


def _check_sizes(config: Config) -> None:
    steps = config.augment.size_schedule
    what = f"--size_schedule {' '.join(steps)}"
    if not all(re.fullmatch(r"[1-9]\d*@\d+", step) for step in steps):
        raise UserError(f"{what}: give SIZE@EPOCH, as in 128@0 160@10 224@20")
    epochs, sizes = zip(*config.augment.size_steps, strict=True)
    if epochs[0] != 0 or any(a >= b for a, b in pairwise(epochs)):
        raise UserError(f"{what}: epochs begin with 0 and increase")
    if epochs[-1] >= config.schedule.epochs:
        raise UserError(
            f"{what}: epoch {epochs[-1]} is not among the --epochs {config.schedule.epochs}"
        )
    if not isinstance(config.model.input_size, int):
        raise UserError(f"{what}: sizes are of squares, --input_size is not")
    if sizes[-1] != config.model.input_size:
        raise UserError(f"{what}: the last size is not --input_size {config.model.input_size}")
