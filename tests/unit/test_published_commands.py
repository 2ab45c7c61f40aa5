"""Every published command of the classifier is understood as it is written; recipes repeat them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from config.command_line import parse_args
from run_with_submitit import build_executor, main, plan
from tests.unit.test_config import OF_SLURM

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line
    for line in (ROOT / "tests/golden/commands.txt").read_text().splitlines()
    if line.startswith("python ")
]
OF_MAIN = [command for command in COMMANDS if " main.py " in command]
OF_SUBMITIT = [command for command in COMMANDS if "run_with_submitit.py" in command]


def flags_of(command):
    """The command's flags, read without the project's parser."""
    words = shlex.split(command.partition(".py ")[2])
    return dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))


def as_written(value):
    return {"true": True, "false": False}.get(value, value)


def assert_understood(flat, written):
    for name, value in written.items():
        expected = as_written(value)
        if isinstance(flat[name], int | float) and not isinstance(flat[name], bool):
            expected = float(expected)
        assert flat[name] == expected, name


def test_all_are_here():
    assert (len(OF_MAIN), len(OF_SUBMITIT)) == (2, 10)


@pytest.mark.parametrize("command", OF_MAIN)
def test_main(command):
    config = parse_args(shlex.split(command.partition("main.py ")[2]))
    assert_understood(config.flat(), flags_of(command))


@pytest.mark.parametrize("command", OF_SUBMITIT)
def test_submitit_dry_run(command, monkeypatch, capsys):
    argv = ["run_with_submitit.py", *shlex.split(command.partition(".py ")[2]), "--dry_run", "true"]
    monkeypatch.setattr("sys.argv", argv)
    main()
    lines = capsys.readouterr().out.splitlines()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(.*)", "\n".join(lines)))
    written = flags_of(command)
    assert options["nodes"] == written["nodes"]
    assert options["gpus-per-node"] == options["ntasks-per-node"] == written["ngpus"]
    assert options["mem"] == f"{40 * 1024 * int(written['ngpus'])}MB"
    assert (options["time"], options["signal"]) == (str(72 * 60), "USR2@120")
    assert not {"partition", "constraint", "account", "qos", "comment"} & options.keys()
    comment = lines[lines.index("# main.py:") :]
    shown = yaml.safe_load("\n".join(line.removeprefix("# ") for line in comment))
    assert shown["main.py"]["output_dir"] == written["job_dir"]
    rest = {name: value for name, value in written.items() if name not in OF_SLURM}
    flat = parse_args([]).flat() | shown["main.py"]
    assert_understood(flat, rest)


def test_a_folder_and_a_constraint_of_the_release():
    _, slurm, folder = plan(["--use_volta32"])
    assert "#SBATCH --constraint=volta32gb" in build_executor(slurm, folder).text()
    assert str(folder) == "logs/%j"


def test_output_dir_is_job_dir_unless_given():
    assert plan(["--job_dir", "a/%j"])[0].checkpoint.output_dir == "a/%j"
    assert plan(["--job_dir", "a", "--output_dir", "b"])[0].checkpoint.output_dir == "b"


def recipe_of(command):
    """The recipe of a published command, by the folder that its data and input size name."""
    written = flags_of(command)
    model = written["model"]
    if "finetune" in written:
        return f"finetune384/{model.removesuffix('_img384')}_img384.yaml"
    return f"imagenet{'22k' if '22k' in written['data_path'] else '1k'}/{model}.yaml"


@pytest.mark.parametrize("command", OF_SUBMITIT)
def test_recipe_repeats_the_command(command):
    recipe = ROOT / "recipes" / recipe_of(command)
    places = {"data_path": "x", "output_dir": "x", "finetune": "x"}
    published, _, _ = plan(shlex.split(command.partition(".py ")[2]))
    ours = parse_args(["--config", str(recipe)])
    assert ours.flat() | places == published.flat() | places


RECIPES = [p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "recipes"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_commands_in_recipes(recipe):
    """Both forms of a recipe parse, name it, and have the same total batch."""
    text = recipe.read_text()
    commands = re.findall(r"^#   ((?:python|torchrun).*)$", text, re.MULTILINE)
    assert len(commands) == 2
    assert all(str(recipe.relative_to(ROOT)) in command for command in commands)
    on_cluster, slurm, _ = plan(shlex.split(commands[0].partition(".py ")[2]))
    alone = parse_args(shlex.split(commands[1].partition("main.py ")[2]))
    total = on_cluster.total_batch(slurm.nodes * slurm.ngpus)
    assert alone.total_batch(8) == total
    assert f"total batch of {total} images" in text


@pytest.mark.parametrize("name", ["digits", "finetune"])
def test_commands_of_our_own_recipes(name):
    text = (ROOT / f"recipes/{name}.yaml").read_text()
    commands = re.findall(r"^#   ((?:python|torchrun).*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert f"recipes/{name}.yaml" in command
        parse_args(shlex.split(command.partition("main.py ")[2]))


def test_training_notes_have_every_published_run():
    """Each published command once; each recipe in a table, with the numbers of its own commands."""
    lines = (ROOT / "TRAINING.md").read_text().splitlines()
    launched = {line.replace("torchrun", "python -m torch.distributed.launch") for line in lines}
    assert set(OF_MAIN) <= launched
    assert all(lines.count(command) == 1 for command in OF_SUBMITIT)
    rows = [re.match(r"\| \[.*\]\((recipes/\w+/[^)]+)\) (.*) \|$", line) for line in lines]
    in_table = {row[1]: row[2].split(" | ")[-3:] for row in rows if row}
    assert in_table.keys() == {str(recipe.relative_to(ROOT)) for recipe in RECIPES}
    for recipe, numbers in in_table.items():
        text = (ROOT / recipe).read_text()
        patterns = (r"total batch of (\d+)", r"--nodes (\d+)", r"--update_freq (\d+)")
        assert numbers == [re.search(pattern, text)[1] for pattern in patterns], recipe
