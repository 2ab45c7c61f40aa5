"""What the documents tell people to type: code runs, commands parse."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cli import parse_args
from run_with_submitit import plan
from tests.drawings import draw
from tests.integration.conftest import ROOT, launch
from tools import benchmark, convert, export, flops, predict, visualize
from tools.classifier import load_classifier

DOCS = ["README.md", "TRAINING.md", "CONTRIBUTING.md", "docs/deploy.md", "docs/RELIABILITY.md"]

TOOLS = [predict, flops, export, convert, benchmark, visualize]


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


def test_code_of_the_readme_runs():
    ((_, code),) = [block for block in blocks("python") if block[0] == "README.md"]
    done = launch("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 64, 40, 56])\n"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with an image and two checkpoints, and what runs there, knowing hornet alone."""
    image = draw("cross", np.random.RandomState(0), size=120).crop((0, 0, 120, 90))
    image.save(tmp_path / "image.jpg", quality=95)
    for name, size in (("crop", 64), ("warp", 32)):
        torch.manual_seed(0)
        model = timm.create_model("hornet_atto_7x7", num_classes=3, layer_scale_init_value=0.5)
        flags = {"model": "hornet_atto_7x7", "input_size": size}
        state = {"model": model.state_dict(), "args": flags, "classes": list("abc")}
        torch.save(state, tmp_path / f"{name}.pth")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "hornet").symlink_to(ROOT / "models")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return tmp_path, run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crop", "warp"])
def test_code_of_deploy_runs_without_this_project(elsewhere, name):
    pytest.importorskip("onnxruntime")
    folder, run = elsewhere
    of_onnx, of_timm = (code for doc, code in blocks("python") if doc == "docs/deploy.md")
    checkpoint = str(folder / f"{name}.pth")
    assert export.main(["--checkpoint", checkpoint, "--output", str(folder / "mine.onnx")]) == 0
    classifier = load_classifier(checkpoint)
    image = Image.open(folder / "image.jpg").convert("RGB")
    with torch.no_grad():
        logits = classifier.model(classifier.transform(image)[None])[0]
    found = run(sys.executable, "-c", of_onnx + "print(logits[0].tolist())").splitlines()
    assert found[0] == "abc"[logits.argmax()]
    torch.testing.assert_close(torch.tensor(json.loads(found[1])), logits, rtol=1e-4, atol=1e-4)
    # of other sizes the pixels: short sides that rounding could make a pixel shorter
    only_pixels = of_onnx.partition("(logits,)")[0] + "np.save('pixels.npy', pixels)"
    for size in ((107, 64), (249, 300), (64, 107), (65, 64)):
        image.resize(size).save(folder / "image.jpg", quality=95)
        run(sys.executable, "-c", only_pixels)
        pixels = torch.tensor(np.load(folder / "pixels.npy")).permute(2, 0, 1).float()
        shown = Image.open(folder / "image.jpg").convert("RGB")
        torch.testing.assert_close(pixels, classifier.transform(shown), rtol=1e-4, atol=1e-4)
    image.save(folder / "image.jpg", quality=95)
    image = Image.open(folder / "image.jpg").convert("RGB")
    with torch.no_grad():
        logits = classifier.model(classifier.transform(image)[None])[0]

    assert convert.main([checkpoint, str(folder / "mine")]) == 0
    code = "from PIL import Image\nimage = Image.open('image.jpg').convert('RGB')\n"
    code += of_timm + "print(model(transform(image)[None])[0].tolist())"
    found = json.loads(run(sys.executable, "-c", code))
    torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_scripts_of_others_know_the_models(elsewhere):
    folder, run = elsewhere
    (block,) = [text for _, text in blocks("bash") if "WITH=" in text]
    for name in ("train", "validate"):
        script = "import sys, timm\nprint(timm.is_model('hornet_tiny_gf'), *sys.argv)\n"
        (folder / f"{name}.py").write_text(script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    lines = run("env", f"PATH={path}", "bash", "-ec", block).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["True", "train.py", "--data-dir"], ["True", "validate.py", "my_images/val"],
    ]  # fmt: skip


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


@pytest.mark.parametrize("tool", TOOLS, ids=lambda module: module.__name__)
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
        assert (ROOT / name).parent.joinpath(target).exists(), target
