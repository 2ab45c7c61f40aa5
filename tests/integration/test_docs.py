"""What the documents tell people to type: code runs, commands parse."""

import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks
from config.command_line import parse_args
from inference.classifier import load_classifier
from models import GnConv
from models.variants import _MMPRETRAIN, MMPRETRAIN_FILES
from point_clouds import flags as point_clouds
from point_clouds import prepare
from run_with_submitit import plan
from tests.drawings import draw, write_drawings
from tests.integration.conftest import ROOT, launch
from tools import average, compare, convert, export, flops, pack, predict, visualize, web

PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCS = ["README.md", "TRAINING.md", "CONTRIBUTING.md", "point_clouds/README.md", *PAGES]

POINT_CLOUDS = ("point_clouds.train", "point_clouds.test")
TOOLS = {
    f"tools.{name.__name__.rpartition('.')[2]}": name.parser
    for name in (average, predict, flops, export, convert, visualize, web, compare, pack)
} | {"benchmarks": benchmarks.parser, "point_clouds.prepare": prepare.parser}


def blocks(language):
    return [
        (name, text.replace("\\\n", ""))  # a command on several lines
        for name in DOCS
        for text in re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    ]


def commands():
    """Every line to be typed, with its document; those in running text too."""
    found = [
        (name, line.split(" #")[0].strip())
        for name, text in blocks("bash")
        if "WITH=" not in text  # which test_scripts_of_others_know_the_models runs
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for name in DOCS:
        inline = re.findall(r"`((?:python|make|bash) [^`]+)`", (ROOT / name).read_text())
        found += [(name, line) for line in inline if not re.search(r"\.\.\.|NAME|--help", line)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("README.md", "torch.Size([1, 64, 40, 56])\n"),
        pytest.param("docs/models.md", "torch.Size([1, 64, 40, 56])\n", marks=pytest.mark.slow),
        pytest.param("docs/speed.md", "", marks=pytest.mark.slow),
    ],
)
def test_code_runs(name, printed):
    code = "\n".join(text for page, text in blocks("python") if page == name)
    done = launch("-c", code.replace("pretrained=True", "pretrained=False"))  # no download
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_all_code_is_tested():
    here = {"README.md", "docs/models.md", "docs/speed.md", "docs/deploy.md"}
    of_dense = {"docs/detection-and-segmentation.md"}  # tests/dense/test_docs.py
    assert {name for name, _ in blocks("python")} == here | of_dense


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with an image and three checkpoints, and what runs there, knowing hornet alone."""
    image = draw("cross", np.random.RandomState(0), size=120).crop((0, 0, 120, 90))
    image.save(tmp_path / "image.jpg", quality=95)
    for name, size in (("crop", 64), ("warp", 32), ("rectangle", [48, 80])):
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
@pytest.mark.parametrize("name", ["crop", "warp", "rectangle"])
def test_code_of_deploy_runs_without_this_project(elsewhere, name):
    pytest.importorskip("onnxruntime")
    folder, run = elsewhere
    codes = [code for doc, code in blocks("python") if doc == "docs/deploy.md"]
    (of_onnx,) = [code for code in codes if "import onnxruntime" in code]
    (of_timm,) = [code for code in codes if "timm.create_model" in code]
    checkpoint = str(folder / f"{name}.pth")
    assert export.main(["--checkpoint", checkpoint, "--output", str(folder / "mine.onnx")]) == 0
    classifier = load_classifier(checkpoint)
    image = Image.open(folder / "image.jpg").convert("RGB")
    with torch.no_grad():
        logits = classifier.model(classifier.preprocessing.transform(image)[None])[0]
    found = run(sys.executable, "-c", of_onnx + "print(logits[0].tolist())").splitlines()
    assert found[0] == "abc"[logits.argmax()]
    torch.testing.assert_close(torch.tensor(json.loads(found[1])), logits, rtol=1e-4, atol=1e-4)
    # of other sizes the pixels: short sides that rounding could make a pixel shorter
    only_pixels = of_onnx.partition("(logits,)")[0] + "np.save('pixels.npy', pixels)"
    for size in ((107, 64), (249, 300), (64, 107), (65, 64)):
        image.resize(size).save(folder / "image.jpg", quality=95)
        run(sys.executable, "-c", only_pixels)
        pixels = torch.tensor(np.load(folder / "pixels.npy"))[0]
        shown = Image.open(folder / "image.jpg").convert("RGB")
        torch.testing.assert_close(
            pixels, classifier.preprocessing.transform(shown), rtol=1e-4, atol=1e-4
        )
    image.save(folder / "image.jpg", quality=95)
    image = Image.open(folder / "image.jpg").convert("RGB")
    with torch.no_grad():
        logits = classifier.model(classifier.preprocessing.transform(image)[None])[0]

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


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that has what the commands name: recipes, and a run that has left its flags."""
    for name in ("main.py", "recipes", "object_detection", "semantic_segmentation", "point_clouds"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs/mine").mkdir(parents=True)
    parse_args([]).save(tmp_path / "runs/mine/config.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "command"), commands())
def test_command_parses(name, command, clone, tmp_path):
    words = shlex.split(command.partition(" > ")[0])
    if words[0] == "torchrun" and "-m" in words:
        words = ["python", *words[words.index("-m") :]]
    module = words[2] if words[:2] == ["python", "-m"] else ""
    if words[0] == "make":
        (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets.split()
    elif "run_with_submitit.py" in words:
        plan(words[words.index("run_with_submitit.py") + 1 :])
    elif "main.py" in words:
        assert words[0] == "torchrun" or words[:2] == ["python", "main.py"] or "launch" in module
        parse_args(words[words.index("main.py") + 1 :])
    elif (places := [i for i, word in enumerate(words) if word in POINT_CLOUDS]) != []:
        config, *flags = words[places[0] + 1 :]
        flags = flags[1:] if "test" in words[places[0]] else flags
        assert config == "--help" or point_clouds.parse_args(["--config", config, *flags])
    elif module in TOOLS:
        TOOLS[module]().parse_args(words[3:])
    elif module.startswith(("object_detection.", "semantic_segmentation.")):
        assert (ROOT / words[3]).is_file()  # tests/dense/test_docs.py parses it
    elif module.startswith(("examples.", "tests.")):  # which test_examples.py and others run
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert all((ROOT / word).exists() for word in words[3:] if "/" in word)
    elif words[0] == "npm" or module == "http.server":  # tests/clients/test_browser.py
        assert (ROOT / words[3 if words[0] == "npm" else 4] / "package.json").is_file()
    elif words[0] == "bash":  # CONFIG and GPUs: tests/dense/test_docs.py
        assert (ROOT / words[1]).is_file()
        assert words[1] == ".ci/run" or (ROOT / words[2]).is_file()
    elif words[:2] == ["pip", "install"]:
        extras = importlib.metadata.metadata("hornet-pytorch").get_all("Provides-Extra") or []
        assert set(re.findall(r"\w+", words[2])) <= set(extras)
    else:
        assert command == "source .venv/bin/activate"


def test_tools_start_without_optional_packages():
    """Those of `train` suffice; the packages of other extras are imported where they are used."""
    optional = [
        *("mmengine", "mmcv", "mmdet", "mmseg", "gradio", "onnx", "onnxscript", "onnxruntime"),
        *("openvino", "executorch", "litert_torch", "ncnn", "pnnx", "coremltools", "wandb"),
        *("simplejpeg", "cv2", "tifffile", "imagecodecs", "pillow_heif", "webdataset"),
        *("h5py", "trimesh"),
    ]
    starting = ["main", "benchmarks.__main__", "point_clouds.train", "point_clouds.test"]
    starting += [f"{task}.predict" for task in ("object_detection", "semantic_segmentation")]
    starting += [f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")]
    code = f"""
import sys
sys.modules |= dict.fromkeys({optional})
import {", ".join(starting)}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_page_on_fine_tuning(clone):
    """The commands of the page, one after the other, with a small model for the published one."""
    pytest.importorskip("onnxruntime")
    weights = clone / "small.pth"
    torch.manual_seed(0)
    model = timm.create_model("hornet_atto_7x7", num_classes=10)
    torch.save({"model": model.state_dict(), "args": {"model": "hornet_atto_7x7"}}, weights)
    write_drawings(clone / "my_images", images_per_class=20)
    write_drawings(clone / "new_images", images_per_class=2, seed=1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    texts = [text for name, text in blocks("bash") if name == "docs/fine-tuning.md"]
    lines = [*dict.fromkeys(line for text in texts[1:] for line in text.splitlines())]
    assert texts[0].strip() in lines  # the page opens with one of the others
    lines.remove("source .venv/bin/activate")
    assert len(lines) == 10
    for line in lines:
        line = line.replace("hornet_tiny_gf.in1k", str(weights))
        if "main.py --config recipes" in line:
            line += " --input_size 64 --num_workers 0 --epochs 2"
        if "--finetune runs/head" in line:
            shutil.rmtree(clone / "runs/mine")  # else the finished run would be resumed
        done = subprocess.run(["bash", "-c", line], cwd=clone, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, (line, done.stderr[-2000:])
    evaluated = clone / "runs/mine/evaluated"
    for left in (clone / "runs/mine/report.html", evaluated / "accuracy_per_class.csv",
                 clone / "mine.onnx", clone / "mine/model.safetensors"):  # fmt: skip
        assert left.stat().st_size > 0
    assert len((clone / "answers.csv").read_text().splitlines()) == 1 + 6 * 3
    held_out = (evaluated / "predictions.csv").read_text().splitlines()
    assert len(held_out) == 1 + 3 * 4


def test_lines_beside_equations():
    """Each line that the design names stands in the file that it names."""
    rows = re.findall(r"^\|.*\| `([^`]+)` \| \[[^]]+\]\(([^)]+)\) \|$",
                      (ROOT / "docs/design.md").read_text(), re.MULTILINE)  # fmt: skip
    assert len(rows) >= 15
    for line, path in rows:
        lines = [text.strip() for text in (ROOT / "docs" / path).read_text().splitlines()]
        assert line in lines, (line, path)


def test_costs_of_the_design():
    """Multiply-adds a pixel: what the page says of each part, and its bound (3.7)."""
    page = (ROOT / "docs/design.md").read_text().replace("\n", " ")
    ((over, under),) = re.findall(r"C \(2K\^2 \+ \\frac\{(\d+)\}\{(\d+)\} C \+ 2\)", page)
    bound = 512 * (2 * 49 + int(over) / int(under) * 512 + 2)
    assert "$C_k = C / 2^{n-1-k}$" in page
    costs = {}
    for order in (1, 2, 3, 4, 5):
        layer = GnConv(512, order=order)
        parts = {name: sum(p.numel() for n, p in layer.named_parameters()
                           if n.startswith(name) and n.endswith("weight"))
                 for name in ("proj_in", "dwconv", "pws", "proj_out")}  # fmt: skip
        assert parts["proj_in"] == 2 * 512**2
        assert parts["pws"] == pytest.approx(2 / 3 * 512**2 * (1 - 4 ** (1 - order)))
        assert parts["dwconv"] < 2 * 49 * 512
        costs[order] = sum(parts.values()) + sum(layer.dims)
        assert costs[order] < bound
        assert layer.dims == [512 / 2 ** (order - 1 - k) for k in range(order)]
    assert bound < 1.01 * costs[5]  # and the bound is one that is nearly reached
    assert f"order 5 takes {costs[5] / costs[2] - 1:.0%}".replace("%", " %") in page


def test_figure_of_the_block():
    """It shows the widths of a real layer."""
    figure = (ROOT / "docs/block.svg").read_text().partition("</metadata>")[2]
    shown = "".join("".join(re.findall(r">([^<]+)<", figure)).split())
    layer = GnConv(64, order=3)
    for conv in (layer.proj_in, *layer.pws, layer.proj_out):
        assert f"{conv.in_channels}→{conv.out_channels}" in shown
    assert str(sum(layer.dims)) in shown
    assert "γ" in shown


def test_zoo():
    """Every released model is there, with the recorded facts."""
    facts = json.loads((ROOT / "tests/golden/model_zoo.json").read_text())["models"]
    facts = {name: fact for name, fact in facts.items() if "checkpoint_url" in fact}
    lines = re.findall(
        r"^\| `(hornet_\w+)\.(\w+)` \| (.*) \|$", (ROOT / "docs/models.md").read_text(), re.M
    )
    assert sorted(name for name, _, _ in lines) == sorted(facts)
    for name, tag, rest in lines:
        data, pixels, parameters, adds, published, top1, again, address = rest.split(" | ")
        fact = facts[name]
        assert tag == {"imagenet-1k": "in1k", "imagenet-22k": "in22k"}[fact["checkpoint_data"]]
        assert data.lower() == fact["checkpoint_data"]
        assert int(pixels) == fact["input_size"]
        assert parameters == f"{fact['params'] / 1e6:.1f} M"
        assert adds == f"{fact['gmacs'] + fact['gmacs_fft']:.1f} G"
        assert published == f"{fact['published_params_m']} M, {fact['published_gflops']} G"
        assert top1.strip() == str(fact["published_top1"] or "")
        # mmpretrain's own test agrees with what was published
        assert not again.strip() or abs(float(again.split()[0]) - float(top1)) <= 0.05
        file = MMPRETRAIN_FILES.get(name)
        other = f", [second]({_MMPRETRAIN}{file})" if file else ""
        assert bool(other) == (tag == "in1k") == bool(again.strip())
        assert address == f"[.pth]({fact['checkpoint_url']}){other}"
        assert timm.get_pretrained_cfg(f"{name}.{tag}").url == fact["checkpoint_url"]


def anchors(file):
    """The anchors that GitHub gives the headings of a Markdown file."""
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    file = ROOT / name
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", file.read_text()):
        goal = file.parent / target if target else file
        assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), f"{target}#{anchor}"


def test_figure_of_accuracies(tmp_path):
    """It shows the published numbers."""
    figure = runpy.run_path(str(ROOT / "docs/accuracy.py"))
    facts = json.loads((ROOT / "tests/golden/model_zoo.json").read_text())["models"]
    for kind in ("7x7", "GF"):
        names = [f"hornet_{size}_{kind.lower()}" for size in ("tiny", "small", "base")]
        published = [(facts[n]["published_gflops"], facts[n]["published_top1"]) for n in names]
        assert figure["hornets"](kind) == published
    assert figure["peers"]("Swin") == [(4.5, 81.3), (8.7, 83.0), (15.4, 83.5)]
    assert figure["peers"]("ConvNeXt") == [(4.5, 82.1), (8.7, 83.1), (15.4, 83.8)]
    figure["draw"](tmp_path / "figure.svg")
    assert "</svg>" in (tmp_path / "figure.svg").read_text()
