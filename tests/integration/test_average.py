"""tools.average: means, soups, and mistakes."""

import json
import math

import pytest
import torch

import main as trainer
from checkpoints.averaging import average, greedy_soup
from checkpoints.reading import read_checkpoint
from config.command_line import parse_args
from runtime.errors import UserError
from tools.average import main


def test_the_mean_is_taken_in_double_precision():
    every = [{"w": torch.full((2,), 0.1 * i), "n": torch.tensor(i)} for i in (1, 2, 4)]
    mean = average(every)
    assert torch.equal(mean["w"], torch.full((2,), (0.1 + 0.2 + 0.4) / 3))
    assert (mean["w"].dtype, mean["n"]) == (torch.float32, 4)
    halves = [{"w": torch.tensor([60000.0]).half()}] * 3
    assert average(halves)["w"].item() == 60000  # their sum is no float16


@pytest.mark.parametrize("other", [{"w": torch.ones(2)}, {"v": torch.ones(3)}])
def test_other_models_are_refused(other):
    with pytest.raises(UserError, match="different models: (w|v, w) differ"):
        average([{"w": torch.ones(3)}, other])


def test_weights_that_are_not_finite():
    with pytest.raises(UserError, match="the average of w is not finite"):
        average([{"w": torch.ones(2)}, {"w": torch.tensor([1.0, math.nan])}])


def test_a_soup_leaves_out_what_lowers_its_accuracy():
    """The accuracy of a weight w is 1 - |w - 3|: the best is 2.6, 3.6 helps, 9 does not."""
    every = [{"w": torch.tensor([value])} for value in (9.0, 3.6, 2.6)]
    soup, chosen, accuracies, best = greedy_soup(every, lambda w: 1 - abs(w["w"].item() - 3))
    assert chosen == [2, 1]
    assert soup["w"].item() == pytest.approx(3.1)
    assert accuracies == pytest.approx([-5, 0.4, 0.6])
    assert best == pytest.approx(0.9)


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A run of three epochs with EMAs."""
    folder = tmp_path_factory.mktemp("run")
    flags = [
        *("--model", "hornet_atto_7x7"),
        *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
        *("--data_set", "image_folder", "--data_path", str(digits), "--input_size", "32"),
        *("--num_workers", "0", "--device", "cpu", "--batch_size", "8", "--epochs", "3"),
        *("--warmup_epochs", "0", "--lr", "1e-3", "--layer_scale_init_value", "0.5"),
        *("--model_ema", "true", "--model_ema_more", "0.5", "--output_dir", str(folder)),
    ]
    trainer.run(parse_args(flags))
    return folder


def test_an_average_is_evaluated_as_a_run(run, tmp_path, capsys):
    files = [str(run / f"checkpoint-{epoch}.pth") for epoch in range(3)]
    output = tmp_path / "soup.pth"
    assert main([*files, "--greedy", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    log = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    for record, file in zip(log, files, strict=True):
        assert f"{record['test_acc1']:.2f}% {file}" in lines
    accuracy, _, text = lines[-2].partition("% the average of ")
    assert float(accuracy) >= max(record["test_acc1"] for record in log) - 0.005
    saved = read_checkpoint(output)
    names = lines[-1].partition("the average of ")[2].split(", ")
    assert len(names) == int(text)
    expected = average([read_checkpoint(name)["model"] for name in names])
    for name, weight in expected.items():
        torch.testing.assert_close(saved["model"][name], weight, rtol=0, atol=0)
    config = parse_args(["--config", str(run / "config.yaml"), "--eval", "true", "--resume",
                         str(output), "--output_dir", ""])  # fmt: skip
    trainer.run(config)
    assert f"top-1 {accuracy}%" in capsys.readouterr().out


def test_one_of_several_emas(run, tmp_path):
    source = run / "checkpoint-2.pth"
    output = tmp_path / "ema.pth"
    assert main([str(source), "--key", "model_ema_0.5", "--output", str(output)]) == 0
    wanted = read_checkpoint(source)["model_ema_0.5"]
    for name, weight in read_checkpoint(output)["model"].items():
        assert torch.equal(weight, wanted[name])


def test_all_emas_of_a_checkpoint_are_evaluated(run, tmp_path, capsys):
    flags = ["--config", str(run / "config.yaml"), "--eval", "true", "--model_ema_eval", "true"]
    saved = run / "checkpoint-2.pth"
    trainer.run(parse_args([*flags, "--resume", str(saved), "--output_dir", str(tmp_path / "a")]))
    told = capsys.readouterr().out
    assert "test EMA on" in told
    assert main([str(saved), "--key", "model_ema_0.5", "--output", str(tmp_path / "e.pth")]) == 0
    flags += ["--model_ema_eval", "false", "--resume", str(tmp_path / "e.pth")]
    trainer.run(parse_args([*flags, "--output_dir", str(tmp_path / "b")]))
    one, other = tmp_path / "a/predictions_ema_0.5.csv", tmp_path / "b/predictions.csv"
    assert one.read_text() == other.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "--output", "a.pth"], "checkpoint none.pth does not exist"),
        (["{run}", "--output", "a.safetensors"], "a checkpoint ends in .pth"),
        (["{run}", "--output", "none/a.pth"], "none is not a folder"),
        (["{run}", "--key", "model_ema_0.7", "--output", "a.pth"], "no weights under"),
        (["{run}", "--greedy", "--data_path", "none", "--output", "a.pth"],
         "--data_path none is not a folder"),
        (["{run}", "other.pth", "--output", "a.pth"], "other.pth has other classes than"),
        (["--output", "a.pth"], "required: checkpoints"),
        (["less.pth", "--output", "a.pth"], "less.pth lacks frozen weights"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "classes": ["a", "b"]}, "other.pth")
    torch.save({"model": {"w": torch.ones(2)}, "left_out": {"v": 1.0}}, "less.pth")
    file = str(run / "checkpoint-2.pth")
    assert main([word.format(run=file) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a.pth").exists()
