"""The command line: names, spellings, precedence, and errors of one line."""

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml

from config.command_line import parse_args
from config.flags import Config, sections_of
from runtime.errors import UserError

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden/flags.json").read_text())
CHANGED_DEFAULTS = {"device": "auto"}
OF_SLURM = {
    "ngpus",
    "nodes",
    "timeout",
    "job_name",
    "job_dir",
    "partition",
    "use_volta32",
    "comment",
}


def test_flags_keep_published_names_and_defaults():
    flat = Config().flat()
    assert PUBLISHED.keys() - flat.keys() == OF_SLURM
    for name in PUBLISHED.keys() & flat.keys():
        assert flat[name] == CHANGED_DEFAULTS.get(name, PUBLISHED[name]["default"]), name


def test_every_flag_stands_once_in_a_small_documented_section():
    names = [f.name for section in sections_of().values() for f in fields(section)]
    assert len(names) == len(set(names))
    assert all(len(fields(section)) <= 20 for section in sections_of().values())


def test_config_is_immutable():
    config = Config()
    with pytest.raises(FrozenInstanceError):
        config.optim.opt = "sgd"  # type: ignore[misc]


@pytest.mark.parametrize("value", ["", "~", "null"])
def test_a_flag_of_a_recipe_needs_a_value(value, tmp_path):
    (tmp_path / "r.yaml").write_text(f"epochs: 2\noutput_dir: {value}\n")
    with pytest.raises(UserError, match=r"r\.yaml: output_dir has no value"):
        parse_args(["--config", str(tmp_path / "r.yaml")])
    (tmp_path / "r.yaml").write_text(f"clip_grad: {value}\nexp_name: 2026-01-02\n")
    config = parse_args(["--config", str(tmp_path / "r.yaml")])
    assert (config.optim.clip_grad, config.logging.exp_name) == (None, "2026-01-02")


def test_a_recipe_builds_on_others(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.yaml").write_text("epochs: 2\nlr: 0.5\nmodel_ema: t\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nlr: 0.25\n")
    (tmp_path / "inner/c.yaml").write_text("base: [../b.yaml]\nseed: 3\n")
    config = parse_args(["--config", str(tmp_path / "inner/c.yaml"), "--seed", "4"])
    assert (config.schedule.epochs, config.schedule.lr) == (2, 0.25)
    assert (config.ema.model_ema, config.runtime.seed) == (True, 4)
    (tmp_path / "e.yaml").write_text("base: d.yaml")
    for content, message in (
        ("base: missing.yaml", "missing.yaml cannot be read"),
        ("base: 3", "give the name of a recipe"),
        ("base: d.yaml", "builds on this recipe itself"),
        ("base: e.yaml", "builds on this recipe itself"),
    ):
        (tmp_path / "d.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            parse_args(["--config", str(tmp_path / "d.yaml")])


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--model_ema", "t"], "model_ema", True),
        (["--model_ema", "1"], "model_ema", True),
        (["--model_ema", "--lr", "1e-3"], "model_ema", True),
        (["--model_ema", "Yes"], "model_ema", True),
        (["--auto_resume", "n"], "auto_resume", False),
        (["--dist_eval", "0"], "dist_eval", False),
        (["--local-rank=3"], "local_rank", 3),
        (["--opt_betas", "0.9", "0.95"], "opt_betas", [0.9, 0.95]),
        (["--scale", "0.5", "1"], "scale", [0.5, 1.0]),
        (["--lr", "5e-5"], "lr", 5e-5),
        (["--weight_decay_end", "-0.1"], "weight_decay_end", -0.1),
        (["--aa", "none"], "aa", None),
        (["--batch-size", "32"], "batch_size", 32),
        (["--model_kwargs", '{"base_dim": 32}'], "model_kwargs", {"base_dim": 32}),
    ],
)
def test_published_spellings(argv, name, value):
    assert parse_args(argv).flat()[name] == value


@pytest.mark.parametrize("config_first", [True, False])
def test_command_line_overrides_recipe(tmp_path, config_first):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1.0e-3\nepochs: 7\nopt_betas: [0.9, 0.99]\n")
    config_args, lr_args = ["--config", str(recipe)], ["--lr", "2e-3"]
    flat = parse_args(config_args + lr_args if config_first else lr_args + config_args).flat()
    assert (flat["lr"], flat["epochs"], flat["opt_betas"]) == (2e-3, 7, [0.9, 0.99])


def test_saved_config_is_a_recipe(tmp_path):
    config = parse_args(["--opt_betas", "0.9", "0.95", "--model_kwargs", '{"base_dim": 8}'])
    config.save(tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--modle", "x"], "there is no flag modle; did you mean model?"),
        (["--bce_target_thresh", "0.2"], "--bce_target_thresh 0.2 needs --loss bce"),
        (["--distill_alpha", "0.9"], "--distill_alpha 0.9 needs --teacher"),
        (["--patience_epochs", "3"], "--patience_epochs 3 needs --sched plateau"),
        (["--decay_rate", "0.5", "--sched", "wsd"], "--decay_rate 0.5 needs --sched step"),
        (["--focal_gamma", "1"], "--focal_gamma 1.0 needs --loss focal"),
        (["--class_weights", "balanced", "--loss", "focal"], "has its own, --focal_alpha"),
        (["--sched", "plateau", "--disable_eval", "true"], "--sched plateau needs evaluations"),
        (["--sched", "cosin"], "--sched"),
        (["--model_ema_more", "0.9"], "--model_ema_more [0.9] needs --model_ema true"),
        (["--model_ema", "t", "--model_ema_more", "0.9", "2"], "decays are from 0 to 1"),
        (["--eval", "t", "--resume", "x", "--tta", "flips"], "give some of flip, crops, scales"),
        (["--tta", "flip"], "--tta needs --eval true"),
        (["--size_schedule", "128@0", "224-10"], "give SIZE@EPOCH"),
        (["--size_schedule", "0@0", "224@10"], "give SIZE@EPOCH"),
        (["--size_schedule", "128@1", "224@10"], "epochs begin with 0 and increase"),
        (["--size_schedule", "128@0", "160@9", "224@9"], "begin with 0 and increase"),
        (["--size_schedule", "128@0", "160@10"], "the last size is not --input_size 224"),
        (["--size_schedule", "128@0", "224@300"], "epoch 300 is not among the --epochs 300"),
        (["--opt_args", "5"], "--opt_args"),
        (["--compile", "t", "--size_schedule", "128@0", "224@9"], "fail to compile: leave out"),
        (["--compile", "t", "--eval", "t", "--resume", "x", "--tta", "scales"], "leave out"),
        (["--loss", "focal", "--focal_alpha", "-0.5"], "--focal_alpha -0.5: from 0 to 1, or -1"),
        (["--model_ema", "t", "--model_ema_more", "0.9", "0.9"], "a decay occurs twice"),
        (["--schedule_unit", "epoch", "--sched", "wsd"], "for cosine: --sched wsd?"),
        (["--zzzzzz", "1"], "there is no flag zzzzzz; see --help"),
        (["--mod", "x"], "there is no flag mod"),
        (["--lr", "fast"], "--lr fast: expected float"),
        (["--clip_mode", "never"], "--clip_mode never: expected one of step, micro"),
        (["--scale", "0.5"], "--scale [0.5]: expected two numbers"),
        (["--scale", "1", "0.5"], "--scale [1.0, 0.5]: give the smaller number first"),
        (["--cutmix_minmax", "0.9", "0.1"], "--cutmix_minmax"),
        (["--opt_betas", "0.9"], "--opt_betas: give at least two"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--batch_size", "0"], "--batch_size 0: has to be at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--num_workers", "-1"], "--num_workers -1"),
        (["--warmup_epochs", "-1"], "--warmup_epochs -1"),
        (["--smoothing", "1"], "--smoothing 1.0"),
        (["--recount", "0"], "--recount 0"),
        (["--crop_pct", "-1"], "--crop_pct -1.0"),
        (["--batch_size", "33"], "mixup pairs images"),
        (["--drop_path", "2"], "--drop_path 2.0: has to be from 0 to 0.99"),
        (["--clip_grad", "0"], "--clip_grad"),
        (["--eval", "true"], "give --resume"),
        (["--use_amp", "1", "--amp_dtype", "float16", "--clip_mode", "micro"], "float16"),
        (["--model_ema", "perhaps"], "--model_ema perhaps: expected bool"),
        (["--model_ema_eval", "true"], "needs --model_ema true"),
        (["--freeze", "stages.("], "--freeze stages.(: not a regular expression"),
        (["--val_fraction", "1"], "--val_fraction 1.0: has to be from 0 to 0.9"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_end_in_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_misspelt_recipe_key(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epoch: 3\n")
    with pytest.raises(UserError, match="there is no flag epoch; did you mean epochs"):
        parse_args(["--config", str(recipe)])


def test_misspelt_recipe(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match=r"Is a directory$"):  # names are for missing files only
        parse_args(["--config", "recipes/imagenet1k"])
    with pytest.raises(UserError, match=r"near names: recipes/imagenet1k/hornet_tiny_7x7\.yaml"):
        parse_args(["--config", "recipes/imagenet1k/hornet_tiny_7x.yaml"])


@pytest.mark.parametrize("text", ["lr: [unclosed", "- a\n- b\n"])
def test_recipe_that_is_no_yaml_mapping(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError):
        parse_args(["--config", str(recipe)])


def test_recipes_take_the_spellings_of_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "aa: none\nmodel_ema: t\nopt_betas: 0.9 0.95\nlr: 1e-3\nmodel-kwargs: {base_dim: 8}\n"
        "scale: [0.1, 1]\nexp_name: 123\nval_fraction: 0\nclip_grad: null\nuse_amp: yes\n"
    )
    flat = parse_args(["--config", str(recipe)]).flat()
    assert (flat["aa"], flat["model_ema"], flat["opt_betas"]) == (None, True, [0.9, 0.95])
    assert (flat["lr"], flat["model_kwargs"], flat["scale"]) == (1e-3, {"base_dim": 8}, [0.1, 1.0])
    assert (flat["exp_name"], flat["clip_grad"], flat["use_amp"]) == ("123", None, True)


@pytest.mark.parametrize("line", ["lr: fast", "batch_size: 0", "model_ema: perhaps", "epoch: 3"])
def test_a_mistake_in_a_recipe_names_the_file(tmp_path, line):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"seed: 3\n{line}\n")
    with pytest.raises(UserError, match=rf"recipe.yaml: .*{line.partition(':')[0]}"):
        parse_args(["--config", str(recipe), "--lr", "0.1"])


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04\x80")
    with pytest.raises(UserError, match="checkpoint.pth: a recipe is a YAML file of flags"):
        parse_args(["--config", str(tmp_path / "checkpoint.pth")])


def test_every_recipe_is_parsed_and_commented():
    recipes = list((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        flat = parse_args(["--config", str(recipe)]).flat()
        for name, value in yaml.safe_load(recipe.read_text()).items():
            assert flat[name] == value
        assert recipe.read_text().startswith("#")
