"""--smoke true: every recipe in seconds, without touching what the run itself writes."""

import pytest

import main
from config.command_line import parse_args
from config.smoke import shrunk
from run_with_submitit import plan
from runtime.errors import UserError
from tests.integration.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_only_the_size_shrinks(recipe, tmp_path):
    asked = parse_args(["--config", str(recipe), "--smoke", "true", "--output_dir", str(tmp_path)])
    config = shrunk(asked)
    if recipe.stem not in ("digits", "finetune"):
        assert config.model.model == asked.model.model
    for section in ("ema", "augment", "mixup", "evaluation"):
        assert getattr(config, section) == getattr(asked, section)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    ["digits", "finetune", "finetune384/hornet_large_gf_img384", "imagenet22k/hornet_large_7x7"],
)
def test_recipe(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    file, out = ROOT / f"recipes/{recipe}.yaml", tmp_path / "run"
    monkeypatch.chdir(tmp_path)  # data/digits of recipes/digits.yaml
    main.run(parse_args(["--config", str(file), "--smoke", "true", "--output_dir", str(out)]))
    assert "smoke run" in capsys.readouterr().out
    assert not out.exists()
    assert (tmp_path / "run-smoke/checkpoint-1.pth").is_file()


def test_own_data(flags, digits, tmp_path, capsys):
    main.run(parse_args([*flags, "--smoke", "true", "--output_dir", str(tmp_path / "run")]))
    assert "test on 33 images" in capsys.readouterr().out
    saved = tmp_path / "run-smoke" / "config.yaml"
    again = parse_args(["--config", str(saved)])
    assert again.checkpoint.output_dir == str(tmp_path / "run-smoke")
    assert again.data.data_path == str(digits)


def test_nothing_of_the_run_itself_is_touched():
    flags = ["--output_dir", "a/b/", "--log_dir", "c", "--resume", "x.pth", "--finetune", "y.pth"]
    config = shrunk(parse_args([*flags, "--enable_wandb", "true", "--smoke", "true"]))
    flat = config.flat()
    assert (flat["output_dir"], flat["log_dir"]) == ("a/b-smoke", "c-smoke")
    assert (flat["resume"], flat["finetune"], flat["auto_resume"]) == ("", "", False)
    assert not flat["enable_wandb"]
    assert not flat["smoke"]


def test_job_on_slurm_shrinks_too():
    """Its folder is known only once the job is planned."""
    config, _, _ = plan(["--job_dir", "logs/%j", "--smoke", "true"])
    assert shrunk(config).checkpoint.output_dir == "logs/%j-smoke"


def test_evaluation_is_not_shrunk():
    with pytest.raises(UserError, match="--smoke true is for training"):
        parse_args(["--smoke", "true", "--eval", "true", "--resume", "x.pth"])
