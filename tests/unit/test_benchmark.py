"""The benchmark's parts: what it times, counts and refuses. No speed is tested."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import networks
from benchmarks.__main__ import main
from benchmarks.measure import Timing, kept_bytes, paired, peak_bytes
from benchmarks.peers import PLAIN, load_peer
from runtime.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_contenders_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = paired(runs, rounds=3, device=CPU, warm_up=1)
    assert "".join(order) == "abababab"
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_ratios_are_those_of_the_rounds():
    assert Timing([1.0, 2.0, 4.0]).ratios_to(Timing([3.0, 2.0, 2.0])) == [0.5, 1.0, 3.0]


def test_memory_is_counted_in_bytes():
    layer = nn.Linear(100, 10, bias=False)
    x = torch.randn(50, 100)
    # the input was there before; tanh's output is kept for its own gradient
    expected = 4 * (50 * 10)
    assert kept_bytes(lambda: layer(x).tanh().sum(), CPU) == pytest.approx(expected, abs=300)
    assert peak_bytes(lambda: torch.ones(1000).sum(), CPU) == pytest.approx(4000, abs=300)


def test_a_peer_leaves_our_models_alone():
    ours = type(timm.create_model("hornet_atto_7x7"))
    tiny = type(timm.create_model("hornet_tiny_7x7"))
    peer = load_peer(PLAIN)
    assert tiny is ours is type(timm.create_model("hornet_tiny_7x7"))
    assert type(peer["hornet_tiny_7x7"]()) is not ours


def test_peers_that_are_none(tmp_path):
    for content, message in (
        ("1 +", "cannot be imported"),
        ("raise SystemExit(3)", "cannot be imported"),
        ("a = 1", "registers no hornet_"),
    ):
        (tmp_path / "peer.py").write_text(content)
        with pytest.raises(UserError, match=message):
            load_peer(tmp_path / "peer.py")
    with pytest.raises(UserError, match="is not a Python file"):
        load_peer(tmp_path / "none.py")


@pytest.mark.slow
def test_report(tmp_path, capsys):
    small = ["--input-size", "64", "--batch-size", "1", "--rounds", "1", "--dtype", "float32"]
    file = tmp_path / "report.md"
    names = ["--models", "hornet_tiny_gf"]
    table = tmp_path / "results.csv"
    outputs = ["--output", str(file), "--results-file", str(table)]
    assert main(["inference", "training", *names, *small, *outputs]) == 0
    with table.open() as opened:
        (result,) = csv.DictReader(opened)
    assert (result["model"], result["infer_img_size"]) == ("hornet_tiny_gf", "64")
    assert float(result["infer_samples_per_sec"]) == pytest.approx(
        1e3 / float(result["infer_step_time"]), rel=0.01
    )
    assert result["param_count"] == "22.99"
    report = capsys.readouterr().out
    assert report == file.read_text()
    rows = [line for line in report.splitlines() if line.startswith("| hornet_tiny_gf batch 1")]
    whats = [row.split("|")[2].strip() for row in rows]
    assert whats == [
        *("inference, as built", "inference, folded", "inference, convnext_tiny"),
        *(f"forward and backward, {name}" for name in ("training", "lean", "convnext_tiny")),
        *("saved for backward", "saved for backward, lean"),
        *(f"peak memory, {name}" for name in ("training", "lean", "convnext_tiny")),
    ]
    assert all(0.05 < float(row.split("|")[3]) < 20 for row in rows)


@pytest.mark.slow
def test_rates_of_prediction(capsys):
    assert main(["predict", "--rounds", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "tools.predict" in line]
    assert [row.split("|")[2][-2] for row in rows] == ["1", "2"]  # workers
    assert all(0.2 < float(row.split("|")[3]) < 5 for row in rows)


def test_a_mistake_leaves_an_older_report(tmp_path, capsys):
    (tmp_path / "report.md").write_text("kept")
    (tmp_path / "peer.py").write_text(PEER_OF_OTHER_WEIGHTS)
    arguments = ["training", "--output", str(tmp_path / "report.md"), "--dtype", "float32"]
    assert main([*arguments, "--peer", str(tmp_path / "peer.py")]) == 1
    assert "the weights of its hornet_tiny_7x7 do not fit" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == "kept"


PEER_OF_OTHER_WEIGHTS = """
from timm.models import register_model
from torch import nn

@register_model
def hornet_tiny_7x7(pretrained=False, **_):
    return nn.Linear(1, 1)

@register_model
def hornet_tiny_gf(pretrained=False, **_):
    return nn.Linear(1, 1)
"""


def test_what_there_is_no_time_for_is_named(capsys):
    assert main(["--gpu", "--device", "cpu", "--minutes", "1e-9", "--rounds", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert len(rows) == 24
    assert "| hornet_tiny_7x7 batch 128 at 224, bfloat16 | training | not measured |" in rows[0]
    assert "| hornet_base_gf batch 1 at 224, bfloat16 | inference | not measured |" in rows[-1]


@pytest.mark.slow
def test_it_needs_the_packages_of_the_models_alone():
    """On a machine that has torch, timm and torchvision."""
    others = [
        "jsonargparse",
        "tensorboardX",
        "submitit",
        "matplotlib",
        "sklearn",
        "cv2",
    ]  # tqdm comes with timm
    code = f"""
import sys
sys.modules |= dict.fromkeys({others})
from benchmarks.__main__ import main
sys.exit(main(["--gpu", "--device", "cpu", "--minutes", "1e-9", "--rounds", "1"]))"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training", "--models", "hornet_tinny_gf"], "near names: hornet_tiny_gf"),
        (["training", "--models", "hornet_atto_gf"], "has no hornet_atto_gf; it has hornet_tiny"),
        (["trainning"], "there is no mode trainning"),
        (["--rounds", "0"], "have to be 1 or more"),
        (["training", "--gpu", "--device", "cpu"], "leave out modes"),
        (["--gpu", "--device", "cpu", "--dtype", "float32"], "leave out --dtype"),
        (["--minutes", "nan"], "give a number above 0"),
        (["--input-size", "5"], "has to be 32 or more"),
        (["--threads", "100000"], "at most 1024"),
        (["--output", "/nowhere/report.md"], "--output /nowhere/report.md cannot be a file"),
        (["training", "--results-file", "a.csv"], "--results-file needs the mode inference"),
        (["inference", "--results-file", "a.csv"], "and one --dtype"),
        (["--models", "resnet50"], "resnet50 is not a HorNet"),
    ],
)
def test_mistakes_end_in_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.delattr(networks, "matrix_rates")  # nothing is measured before they are told
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
