"""What README.md and TRAINING.md tell people to type: code runs, commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from cli import parse_args
from run_with_submitit import plan
from tests.integration.conftest import ROOT, launch

DOCS = ["README.md", "TRAINING.md", "CONTRIBUTING.md"]


def blocks(language):
    return [
        (name, text)
        for name in DOCS
        for text in re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    ]


def commands():
    return [
        line.split("#")[0].strip()
        for _, text in blocks("bash")
        for line in text.splitlines()
        if line.strip()
    ]


@pytest.mark.parametrize(("name", "code"), blocks("python"))
def test_code_runs(name, code):
    done = launch("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 64, 40, 56])\n"


def test_commands_parse():
    of_main = [command for command in commands() if "main.py" in command]
    assert len(of_main) >= 5
    for command in of_main:
        parse_args(shlex.split(command.partition("main.py")[2]))
    for command in commands():
        if "run_with_submitit.py" in command:
            plan(shlex.split(command.partition("run_with_submitit.py")[2]))


def test_make_targets_and_modules_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        for target in re.findall(r"\bmake (\S+)", command):
            assert f"\n{target}:" in makefile, command
        for module in re.findall(r"python -m (?!torch)(\S+)", command):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / Path(target)).exists(), target
