"""Whatever flags, checkpoints and images hold: a run ends well or in one line, within seconds."""

import copy
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from config.command_line import parse_args
from input_pipeline.images import load_image
from runtime.errors import UserError

pytestmark = pytest.mark.slow
EACH = settings(
    deadline=10_000,  # ms
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # simplifying takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(argv):
    """'' of a run that ended well, else the line that it ended in."""
    try:
        main.run(parse_args([str(word) for word in argv]))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def small(digits):
    """Flags of a run of two epochs of two steps."""
    return [
        *("--model", "hornet_atto_7x7"),
        *("--model_kwargs", '{"base_dim": 8, "depths": [1, 1, 1, 1]}'),
        *("--data_set", "image_folder", "--data_path", digits, "--max_images", "16"),
        *("--input_size", "32", "--device", "cpu", "--num_workers", "0", "--batch_size", "8"),
        *("--epochs", "2", "--warmup_epochs", "0", "--model_ema", "true"),
    ]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A checkpoint in the middle of such a run."""
    folder = tmp_path_factory.mktemp("trained")
    assert outcome([*small, "--output_dir", folder]) == ""
    return folder / "checkpoint-0.pth"


def use_of(path):
    """What runs do with a checkpoint."""
    ways = {"resume": ["--resume"], "finetune": ["--finetune"], "ema": ["--model_ema_eval", "true"]}
    ways["eval"] = ["--eval", "true", "--resume"]
    ways["ema"] += ways["eval"]
    return {name: [*flags, path] for name, flags in ways.items()}


@settings(EACH, max_examples=100)
@given(data=st.data())
def test_bytes_of_checkpoints(small, trained, tmp_path, data):
    content = bytearray(trained.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # most of a file is numbers; what is around them matters more
        place = data.draw(st.integers(0, 5000) | st.integers(0, len(content) - 1))
        place = data.draw(st.sampled_from([place, len(content) - 1 - place])) % len(content)
        what = data.draw(st.sampled_from(["replace", "insert", "remove", "end"]))
        new = data.draw(st.binary(min_size=1, max_size=8))
        length = len(new) if what in ("replace", "remove") else 0
        content[place : place + length] = new if what in ("replace", "insert") else b""
        if what == "end":
            del content[place:]
        if not content:
            break
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    way = data.draw(st.sampled_from(["resume", "finetune", "eval", "ema"]))
    assert "\n" not in outcome([*small, *use_of(path)[way]])


def places(value, path=()):
    """The ways to everything within a state of dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from([(), (1,), (3, 5), (8, 3, 4, 4)]).map(torch.ones),
    st.just(torch.full((8,), math.nan)),
    st.just(torch.ones(3, dtype=torch.int64)),
    st.just(torch.ones(8).to_sparse()),
    st.just(torch.ones(8, dtype=torch.complex64)),
)


@settings(EACH, max_examples=100)
@given(data=st.data())
def test_contents_of_checkpoints(small, trained, tmp_path, data):
    state = copy.deepcopy(torch.load(trained, weights_only=True))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(list(places(state))))
        owner = state
        for key in way:
            owner = owner[key]
        what = data.draw(st.sampled_from(["other", "other", "lacks", "renamed"]))
        if what == "lacks" and isinstance(owner, dict):
            del owner[last]
        elif what == "renamed" and isinstance(owner, dict):
            owner[data.draw(st.integers() | st.text(max_size=5))] = owner.pop(last)
        else:
            owner[last] = data.draw(JUNK)
    path = tmp_path / "strange.pth"
    torch.save(state, path)
    way = data.draw(st.sampled_from(["resume", "resume", "finetune", "eval", "ema"]))
    assert "\n" not in outcome([*small, *use_of(path)[way]])


VALUES = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats().map(str),
    st.sampled_from(["true", "false", "null", "none", "", "abc", "0", "1", "-1", "1e30", "1e-30"]),
    st.sampled_from(["nan", "inf", "[1, 2]", "[0.5, 0.5]", "[]", "{}", '{"a": 1}', "/nowhere"]),
    st.sampled_from(["adamw", "sgd", "lamb", "rand-m9-mstd0.5-inc1", "bicubic", "pixel", "batch"]),
)
# places to write to, other machines, and amounts of work
LEFT_OUT = {"output_dir", "log_dir", "dist_url", "dist_timeout", "world_size", "dist_on_itp"}
LEFT_OUT |= {"num_workers", "epochs", "model_kwargs", "data_path", "data_set", "enable_wandb"}
LEFT_OUT |= {"compile", "smoke", "local_rank", "input_size", "max_images"}
NAMES = sorted(parse_args([]).flat().keys() - LEFT_OUT)


@settings(EACH, max_examples=200)
@given(flags=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4))
def test_flags(small, flags):
    given_flags = [f"--{name}={value}" for name, value in flags.items()]
    assert "\n" not in outcome([*small, *given_flags])


@settings(EACH, max_examples=50)
@given(text=st.text(max_size=200))
def test_recipes(small, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, errors="ignore")
    assert "\n" not in outcome([*small, "--config", path])


def encoded(kind, mode):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 50, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 256)
    elif mode != "RGB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


IMAGES = {
    (kind, mode): encoded(kind, mode)
    for kind, modes in {
        "JPEG": ["RGB", "L", "CMYK"],
        "PNG": ["RGB", "RGBA", "P", "I;16", "1"],
        "GIF": ["P"],
        "WEBP": ["RGB"],
        "TIFF": ["RGB", "I;16", "CMYK"],
        "BMP": ["RGB"],
        "PPM": ["RGB"],
    }.items()
    for mode in modes
}


@settings(EACH, max_examples=200)
@given(data=st.data())
def test_images(tmp_path, data):
    content = bytearray(IMAGES[data.draw(st.sampled_from(sorted(IMAGES)))])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 80) | st.integers(0, len(content) - 1)) % len(content)
        new = data.draw(st.binary(min_size=1, max_size=4))
        content[place : place + len(new)] = new
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    message = ""
    try:
        assert load_image(str(path)).mode == "RGB"
    except UserError as error:
        message = str(error)
    assert not message or re.fullmatch(f"image {path} (cannot be read|is too large): .*", message)
