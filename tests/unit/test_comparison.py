"""tools.compare on folders as runs leave them."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from tools.compare import main
from utils import use_deterministic_algorithms


def run(folder, accuracy, epochs=3, done=3, **flags):
    folder.mkdir()
    flags = {"model": "hornet_tiny_gf", "epochs": epochs, "output_dir": str(folder)} | flags
    (folder / "config.yaml").write_text(yaml.safe_dump(flags))
    lines = [{"epoch": e, "test_acc1": accuracy - done + 1 + e, "max_accuracy": accuracy + 1}
             for e in range(done)]  # fmt: skip
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    own = [run(tmp_path / f"a{s}", acc, seed=s, lr=0.1) for s, acc in enumerate((80.0, 81.5, 79.0))]
    return [*own, run(tmp_path / "b", 70.25, seed=0, lr=0.2, aa="a|b_c")]


def test_means_over_seeds(runs, capsys):
    assert main(runs) == 0
    told = capsys.readouterr()
    title, rule, first, second = told.out.splitlines()
    assert title == "| aa | lr | runs | top-1 (%) | best (%) |"
    assert rule == "| --- | --- | --- | --- | --- |"
    deviation = statistics.stdev((80.0, 81.5, 79.0))
    assert (
        first
        == f"| rand-m9-mstd0.5-inc1 | 0.1 | 3 | 80.17 ± {deviation:.2f} | 81.17 ± {deviation:.2f} |"
    )
    assert second == r"| a\|b_c | 0.2 | 1 | 70.25 | 71.25 |"
    assert told.err == ""


def test_unfinished_runs_are_not_averaged(tmp_path, capsys):
    names = [run(tmp_path / "a", 80.0, seed=0), run(tmp_path / "b", 70.0, seed=1, done=2)]
    assert main(names) == 0
    title, _, first, second = capsys.readouterr().out.splitlines()
    assert title.startswith("| epochs | runs |")
    assert first.startswith("| 3 | 1 | 80.00 |")
    assert second.startswith("| 2 of 3 | 1 | 70.00 |")


def test_latex(runs, capsys):
    assert main([*runs[:2], runs[3], "--latex"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == r"\begin{tabular}{lllll}"
    assert lines[2] == r"aa & lr & runs & top-1 (\%) & best (\%) \\"
    assert lines[4] == r"rand-m9-mstd0.5-inc1 & 0.1 & 2 & 80.75 $\pm$ 1.06 & 81.75 $\pm$ 1.06 \\"
    assert lines[5] == r"a|b\_c & 0.2 & 1 & 70.25 & 71.25 \\"


def test_one_group_of_equal_seeds(tmp_path, capsys):
    names = [run(tmp_path / name, 80.0, seed=3) for name in "ab"]
    assert main([*names, names[0]]) == 0  # the same folder counts once
    told = capsys.readouterr()
    assert told.out.splitlines()[2] == "| 2 | 80.00 ± 0.00 | 81.00 ± 0.00 |"
    assert told.err == f"{names[0]}, {names[1]}: some have the same seed\n"


def test_values_that_some_runs_lack(runs, capsys):
    log = Path(runs[1]) / "log.txt"
    log.write_text(log.read_text().replace("81.5", "null"))
    assert main(runs[:3]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| 3 | 79.50 ± 0.71 (of 2) | 81.17 ± ")


def test_flags_of_earlier_versions_have_their_defaults(tmp_path, capsys):
    one = run(tmp_path / "a", 80.0, seed=0)
    two = run(tmp_path / "b", 81.0, seed=1, deterministic=False, results_file="x.csv")
    assert main([one, two]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| 2 | 80.50")


def test_folders_that_are_none(tmp_path, capsys):
    whole = run(tmp_path / "a", 80.0)
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "empty", "is not the folder of a run: it has no config.yaml"),
        (tmp_path / "none", "is not the folder of a run"),
    ):
        assert main([str(folder)]) == 1
        assert f"tools.compare: error: {folder} {message}" in capsys.readouterr().err
        assert main([whole, str(folder)]) == 0
        told = capsys.readouterr()
        assert f"left out: {folder} {message}" in told.err
        assert told.out.splitlines()[2] == "| 1 | 80.00 | 81.00 |"
    assert main([str(tmp_path / "empty"), str(tmp_path / "none")]) == 1
    (tmp_path / "a" / "log.txt").write_text("")
    assert main([whole]) == 1
    assert "no epoch has finished yet" in capsys.readouterr().err
    (tmp_path / "a" / "config.yaml").write_text("[a")
    assert main([whole]) == 1
    assert "config.yaml cannot be read" in capsys.readouterr().err


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    try:
        use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
        # a use that has no deterministic algorithm is named, and goes on
        with pytest.warns(UserWarning, match="put_ does not have a deterministic"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
