"""What README.md and TRAINING.md tell people to type: code runs, commands parse."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm

from cli import parse_args
from run_with_submitit import plan
from tests.integration.conftest import ROOT, launch
from tools import flops, predict

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


def test_commands_parse(tmp_path, monkeypatch):
    # where a run has left its flags, as the commands have it
    (tmp_path / "runs/mine").mkdir(parents=True)
    parse_args([]).save(tmp_path / "runs/mine/config.yaml")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    of_main = [command for command in commands() if "main.py" in command]
    assert len(of_main) >= 5
    for command in of_main:
        parse_args(shlex.split(command.partition("main.py")[2]))
    for command in commands():
        if "run_with_submitit.py" in command:
            plan(shlex.split(command.partition("run_with_submitit.py")[2]))


@pytest.mark.parametrize("tool", [predict, flops], ids=lambda module: module.__name__)
def test_commands_of_tools_parse(tool):
    own = [command for command in commands() if f"-m {tool.__name__} " in command]
    inline = [f"python -m {tool.__name__} {rest}" for rest in inline_commands(tool.__name__)]
    assert own + inline
    for command in own + inline:
        words = shlex.split(command.partition(tool.__name__)[2].partition(">")[0])
        tool.parser().parse_args(words)


def inline_commands(tool):
    texts = [(ROOT / name).read_text() for name in DOCS]
    return [rest for text in texts for rest in re.findall(rf"`python -m {tool} ([^`]*)`", text)]


def test_zoo_of_the_readme():
    """Every released model is there, with the recorded facts."""
    facts = json.loads((ROOT / "tests/golden/model_zoo.json").read_text())["models"]
    facts = {name: fact for name, fact in facts.items() if "checkpoint_url" in fact}
    lines = re.findall(
        r"^\| `(hornet_\w+)\.(\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert sorted(name for name, _, _ in lines) == sorted(facts)
    for name, tag, rest in lines:
        data, pixels, parameters, adds, published, top1, address = rest.split(" | ")
        fact = facts[name]
        assert tag == {"imagenet-1k": "in1k", "imagenet-22k": "in22k"}[fact["checkpoint_data"]]
        assert data.lower() == fact["checkpoint_data"]
        assert int(pixels) == fact["input_size"]
        assert parameters == f"{fact['params'] / 1e6:.1f} M"
        assert adds == f"{fact['gmacs'] + fact['gmacs_fft']:.1f} G"
        assert published == f"{fact['published_params_m']} M, {fact['published_gflops']} G"
        assert top1.strip() == str(fact["published_top1"] or "")
        assert address == f"[.pth]({fact['checkpoint_url']})"
        assert timm.get_pretrained_cfg(f"{name}.{tag}").url == fact["checkpoint_url"]


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
