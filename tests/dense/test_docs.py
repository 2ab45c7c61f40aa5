"""What the READMEs of both trees tell people to type, and their tables."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as MMDET
from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from dense import predict
from dense.configs import read_config
from dense.run import parser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/detection-and-segmentation.md"
ZOO = json.loads((ROOT / "tests/golden/dense_zoo.json").read_text())
TREES = {"object_detection": "detection", "semantic_segmentation": "segmentation"}


def commands(tree):
    """Those of its README, and those for it in the page of both."""
    texts = [(ROOT / tree / "README.md").read_text(), PAGE.read_text()]
    blocks = [
        block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    ]
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(rf"(python -m|bash) {tree}[./]", line)]


@pytest.mark.parametrize("tree", TREES)
def test_commands_parse(tree):
    own = commands(tree)
    assert len(own) >= 9
    for command in own:
        words = shlex.split(command)
        if words[2] == f"{tree}.predict":
            arguments = predict.parser(tree).parse_args(words[3:])
            assert arguments.images
            assert read_config(arguments.config).model
            continue
        action = "train" if "train" in words[1] + words[2] else "test"
        rest = words[2:] if words[0] == "bash" else words[3:]
        if words[0] == "bash":  # CONFIG [CHECKPOINT] GPUS
            assert rest.pop(1 if action == "train" else 2) == "8"
            assert (ROOT / words[1]).is_file()
        arguments = parser(f"{tree}.{action}", action).parse_args(rest)
        assert read_config(arguments.config).model
        folder, _, name = getattr(arguments, "checkpoint", "").rpartition("/")
        if folder.startswith(
            "work_dirs"
        ):  # where the training before it leaves its last checkpoint
            train = read_config(arguments.config).train_cfg
            last = {f"epoch_{train.get('max_epochs')}.pth", f"iter_{train.get('max_iters')}.pth"}
            assert name in last
            assert folder == f"work_dirs/{Path(arguments.config).stem}"


@pytest.mark.parametrize("tree", TREES)
def test_tables(tree):
    text = (ROOT / tree / "README.md").read_text()
    rows = re.findall(
        r"^\| (\w \(\w+\)) \|.*\[config\]\((.*?)\).*`(.*?)`.*model\]\((.*?)\)", text, re.M
    )
    recorded = {name: facts["model"] for name, facts in ZOO[TREES[tree]].items()}
    assert {f"HorNet-{name}": model for name, _, _, model in rows} == recorded
    for _, config, start, _ in rows:
        assert read_config(str(ROOT / tree / config)).model.backbone.pretrained == start
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert link.startswith("http") or (ROOT / tree / link).exists()


def test_code_of_the_page_builds():
    """The config of docs/detection-and-segmentation.md gives a pyramid for its neck."""
    (code,) = re.findall(
        r"```python\n(.*?)```",
        PAGE.read_text(),
        re.DOTALL,
    )
    config = Config.fromstring(code, ".py")
    import_modules_from_strings(**config.custom_imports)
    config.backbone.pretrained = None  # nothing is downloaded in a test
    backbone, neck = (MMDET.build(part) for part in (config.backbone, config.neck))
    maps = neck(backbone(torch.zeros(1, 3, 64, 96)))
    assert [tuple(x.shape) for x in maps][:2] == [(1, 256, 16, 24), (1, 256, 8, 12)]
