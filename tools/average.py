"""Averages the weights of checkpoints of one model: all of them, or those that help.

python -m tools.average runs/mine/checkpoint-2[0-9].pth --output mine.pth
python -m tools.average runs/*/checkpoint-best.pth --output soup.pth --greedy --data_path my_images
python -m tools.average runs/mine/checkpoint-29.pth --key model_ema_0.99 --output ema.pth
"""

import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from checkpoints import fitting, reading
from checkpoints.averaging import Weights, average, greedy_soup
from checkpoints.run_folder import save_checkpoint
from checkpoints.sources import SavedRun, local_file
from config.command_line import parse_args
from config.flags import FinetuneConfig, sections_of
from datasets import build_data
from evaluation import Evaluation
from runtime.distributed import init_distributed
from runtime.errors import Parser, UserError, program
from runtime.logging import setup_logging
from training.build import build_model, prepare_model

logger = logging.getLogger("average")


def parser() -> Parser:
    this = Parser("python -m tools.average", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("checkpoints", nargs="+", help="paths or URLs")
    add("--output", type=Path, required=True, metavar="FILE.pth",
        help="a checkpoint with the average, and the flags and classes of the first")  # fmt: skip
    add("--key", default=FinetuneConfig.model_key,
        help="key of the weights: model, model_ema, model_ema_0.99, ...")  # fmt: skip
    add("--greedy", action="store_true",
        help="from the best one on, leave out those that lower the top-1 accuracy (mAP of several "
        "classes per image) of the average on the evaluation images (greedy soup)")  # fmt: skip
    add("--data_path", "--data-path", help="of the evaluation images; that of the run by default")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return this


@program(parser)
def main(arguments: Namespace) -> None:
    output = arguments.output
    if output.suffix != ".pth":
        raise UserError(f"--output {output}: a checkpoint ends in .pth")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is not a folder")
    context = init_distributed(arguments.device)
    setup_logging(context)
    every, runs = [], []
    for source in arguments.checkpoints:
        path = local_file(source)
        checkpoint = reading.read_checkpoint(path)
        if checkpoint.get("left_out"):
            raise UserError(f"{source} lacks frozen weights (--save_frozen false): not averaged")
        every.append(reading.weights_in(checkpoint, path, keys=arguments.key))
        classes, flags = reading.classes_in(checkpoint, path), reading.flags_in(checkpoint)
        runs.append(SavedRun(source, classes, flags))
        if classes != runs[0].classes:
            raise UserError(f"{source} has other classes than {runs[0].source}")
    chosen, saved = [*range(len(every))], runs[0]
    if arguments.greedy:
        accuracy_of = _evaluation(saved, arguments, context)
        weights, chosen, accuracies, best = greedy_soup(every, accuracy_of)
        told = [
            f"{a:.2f}% {name}" for a, name in zip(accuracies, arguments.checkpoints, strict=True)
        ]
        told.append(f"{best:.2f}% the average of {len(chosen)}")
    else:
        weights, told = average(every), []
    save_checkpoint({"model": weights, "args": saved.flags, "classes": saved.classes}, output)
    names = ", ".join(arguments.checkpoints[i] for i in chosen)
    sys.stdout.write("\n".join([*told, f"{output}: the average of {names}"]) + "\n")


def _evaluation(saved: SavedRun, arguments: Namespace, context: Any) -> Callable[[Weights], float]:
    """Return a function from weights to the top-1 accuracy, evaluated as in the run `saved`."""
    known = {f.name for section in sections_of().values() for f in fields(section)}
    flags = {name: value for name, value in saved.flags.items() if name in known}
    flags |= {"eval": False, "resume": "", "output_dir": "", "finetune": "", "save_frozen": True}
    if arguments.data_path:
        flags["data_path"] = arguments.data_path
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
        yaml.safe_dump(flags, recipe)
        recipe.flush()
        config = parse_args(["--config", recipe.name])
    size = config.model.input_size
    data = build_data(config.data, config.augment, size, False, True, saved, context)
    model = build_model(config.model, len(data.classes), config.data.in_chans)
    model = prepare_model(model, config.compute, context.device)
    evaluation = Evaluation(config, data, context)

    def accuracy_of(weights: Weights) -> float:
        fitting.load_exactly(model, fitting.own_names(weights, model), "of an average")
        return evaluation.of(model, "")[0][config.data.metric]

    return accuracy_of


if __name__ == "__main__":
    sys.exit(main())
