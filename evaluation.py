"""The evaluations of a run: after each epoch, or of a checkpoint with files of predictions."""

import copy
import csv
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torchvision.transforms.functional import five_crop

import engine
import multi_label
from checkpoints import fitting, reading
from checkpoints.sources import local_file
from config.flags import Config
from datasets import Data, crop_pct_of
from input_pipeline.image_sets import UNREADABLE, Images, ImageSet
from input_pipeline.imagenet_sets import (
    ALEXNET_ERRORS,
    IMAGES,
    SEVERITIES,
    RealLabels,
    corruption_errors,
    mean_corruption_error,
)
from input_pipeline.loaders import eval_loader
from input_pipeline.transforms import CROP_PCT, is_warped
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import DistributedContext, all_gather, broadcast_buffers
from runtime.errors import UserError
from runtime.files import open_table, write_table
from runtime.sizes import Size, as_size, sides, size_text
from training.build import TrainSetup, amp_dtype
from training.state import TrainState
from utils import count_parameters

logger = logging.getLogger(__name__)

TITLES = {"acc1": "top-1", "acc5": "top-5", "mAP": "mAP", "f1_micro": "F1 (micro)",
          "f1_macro": "F1 (macro)"}  # fmt: skip
"""Metrics in per cent, as they are called in the log."""
RESULT_COLUMNS = (
    "model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct",
    "interpolation",
)  # fmt: skip
"""Columns of --results_file: those of timm's results-*.csv."""


class Evaluation:
    """The evaluation images of a run with their loader, whose workers live through all epochs."""

    def __init__(self, config: Config, data: Data, context: DistributedContext) -> None:
        assert data.val is not None
        self.config, self.images, self.context = config, data.val, context
        # each rank evaluates all images of a stream
        self.is_shared = config.evaluation.dist_eval and isinstance(data.val, ImageSet)
        self.unreadable = UnreadableImages.of_run(config)
        self.loader = eval_loader(
            data.val, config.data, context, self.unreadable, config.evaluation.dist_eval
        )

    def of(
        self, model: nn.Module, suffix: str, before_batch: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Evaluate a model and log the metrics; return them with the rows of the results.

        By `engine.evaluate`, or `multi_label.evaluate` for images of several classes each.
        """
        batch_size: Any = self.loader.batch_size
        common = 0  # batches that all ranks have for certain: with damaged shards, none
        if isinstance(self.images, ImageSet):
            ranks = self.context.world_size if self.is_shared else 1
            common = math.ceil(len(self.images) / batch_size) // ranks

        def ask(index: int) -> None:
            if index < common:
                before_batch()

        size, precision = batch_size if self.is_shared else None, amp_dtype(self.config.compute)
        of_images = multi_label.evaluate if self.config.data.is_multi_label else engine.evaluate
        metrics, rows = of_images(
            model, self.loader, self.context,
            batch_size=size, precision=precision, before_batch=ask,
        )  # fmt: skip
        images = metrics.pop("images")
        if metrics.pop("unreadable"):
            logger.warning("unreadable images are left out: see %s", self.unreadable.path)
        what = "test" + suffix.replace("_", " ").upper()
        shown = "  ".join(
            f"{title} {metrics[name]:.2f}%" for name, title in TITLES.items() if name in metrics
        )
        logger.info("%s on %d images: %s  loss %.4f", what, images, shown, metrics["loss"])
        return metrics, rows


def evaluate_epoch(
    state: TrainState,
    setup: TrainSetup,
    evaluation: Evaluation | None,
    before_batch: Callable[[], None],
) -> tuple[dict[str, float], list[str]]:
    """Return the test_* entries of log.txt, and the names of the best checkpoints to save.

    `before_batch` is called the same number of times on all ranks.
    """
    if evaluation is None:
        return {}, []
    models = {"": state.bare_model}
    if setup.config.ema.model_ema_eval:
        models |= {f"_{name}": ema.module for name, ema in state.emas.items()}
    record: dict[str, float] = {}
    for suffix, model in models.items():
        # in host memory (--model_ema_force_cpu) it would take minutes where a GPU takes seconds
        model = _on_device(model, setup.context.device)
        broadcast_buffers(model, setup.context)
        metrics, _ = evaluation.of(model, suffix, before_batch)
        record |= {f"test_{name}{suffix}": value for name, value in metrics.items()}
    # after all of them, since a run that is stopped in between evaluates again
    improved, metric = [], setup.config.data.metric
    for suffix, best in (("", "max_accuracy"), ("_ema", "max_ema_accuracy")):
        if suffix not in models:
            continue
        accuracy, loss = record[f"test_{metric}{suffix}"], record[f"test_loss{suffix}"]
        if not suffix and setup.config.schedule.sched == "plateau":
            improves = accuracy > state.progress.max_accuracy
            # rank 0's answer for all: where each evaluates by itself, they may differ by rounding
            improves = all_gather(improves, setup.context)[0]
            state.progress.find_plateau(improves, setup.config.schedule)
        # on a tie, the later: on few images accuracies repeat while the loss still falls
        if math.isfinite(loss) and accuracy >= getattr(state.progress, best):
            setattr(state.progress, best, accuracy)
            improved.append("best-ema" if suffix else "best")
        record[best] = getattr(state.progress, best)
    return record, improved


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model, or its copy, on the device."""
    if next(model.parameters()).device == device:
        return model
    return copy.deepcopy(model).to(device)


class OverClasses(nn.Module):
    """The logits of a classifier for some of its classes, by number."""

    def __init__(self, model: nn.Module, numbers: list[int]) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.register_buffer("numbers", torch.tensor(numbers, device=device))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)[:, self.numbers]


class Views(nn.Module):
    """Logits of probabilities that are averaged over several views of each image (--tta)."""

    def __init__(
        self, model: nn.Module, kinds: Sequence[str], size: Size, is_multi_label: bool = False
    ) -> None:
        super().__init__()
        self.model, self.kinds, self.size = model, kinds, sides(size)
        self.is_multi_label = is_multi_label

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W), larger than `size` with crops -> (N, classes)."""
        views = five_crop(images, [*self.size]) if "crops" in self.kinds else (images,)
        sizes = [self.size]
        if "scales" in self.kinds:
            height, width = self.size
            scaled = [(height + more, width + more) for more in (-32, 32)]
            sizes += [size for size in scaled if min(size) >= 32]
        found = []
        for view, size in itertools.product(views, sizes):
            if size != self.size:
                view = nn.functional.interpolate(view, size, mode="bicubic", antialias=True)
            found.append(self._logits(view, size))
            if "flip" in self.kinds:
                found.append(self._logits(view.flip(3), size))
        logits = torch.stack(found).float()
        if self.is_multi_label:
            yes, no = (nn.functional.logsigmoid(x).logsumexp(dim=0) for x in (logits, -logits))
            return yes - no
        logs = logits.log_softmax(dim=2)
        return logs.logsumexp(dim=0) - math.log(len(found))

    def _logits(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        try:
            return self.model(images)
        except (AssertionError, ValueError, RuntimeError) as error:
            if size == self.size or isinstance(error, torch.OutOfMemoryError):
                raise
            shown = size_text(as_size(size))
            raise UserError(f"--tta scales: the model fails at {shown} pixels: {error}") from None


def evaluate_checkpoint(
    config: Config, model: nn.Module, data: Data, context: DistributedContext
) -> None:
    """Log the accuracy of --resume, and of its EMAs with --model_ema_eval.

    In output_dir, if given, predictions.csv and accuracy_per_class.csv are written. Only the
    classes of the evaluation images are predicted.
    """
    assert data.val is not None
    path = config.checkpoint.resume
    checkpoint = reading.read_checkpoint(local_file(path, context), model)
    evaluated = {"": reading.weights_in(checkpoint, path)}
    if config.ema.model_ema_eval:
        ema = reading.ema_weights_in(checkpoint, path)
        if ema is None:
            raise UserError(f"--model_ema_eval true: checkpoint {path} has no EMA")
        evaluated["_ema"] = ema
        for name in checkpoint:
            if name.startswith("model_ema_"):  # of --model_ema_more
                more = reading.ema_weights_in(checkpoint, path, name)
                evaluated |= {f"_{name.removeprefix('model_')}": more} if more else {}
    evaluation = Evaluation(config, data, context)
    results = Results(config, data.val, context.is_main)
    numbers = {name: number for number, name in enumerate(data.classes)}
    over = [numbers[name] for name in data.val.classes]
    some_classes = len(over) < len(numbers)
    for suffix, saved in evaluated.items():
        weights = fitting.own_names(saved, model)
        fitting.check_head(weights, model, data.classes, path)
        fitting.load_saved(model, checkpoint, weights, path, context, config.finetune)
        evaluated_model = OverClasses(model, over) if some_classes else model
        if config.evaluation.tta:
            size = config.model.input_size
            evaluated_model = Views(
                evaluated_model, config.evaluation.tta, size, config.data.is_multi_label
            )
        metrics, rows = evaluation.of(evaluated_model, suffix)
        if not config.data.is_multi_label:
            logger.info("mean accuracy of the classes: %.2f%%", mean_class_accuracy(rows))
        if context.is_main:
            results.tell(model, metrics, rows, suffix)


class Results:
    """What an evaluation of a checkpoint tells and writes, beside its accuracy.

    Raises UserError, before the evaluation, for files that cannot be read or written.
    """

    def __init__(self, config: Config, images: Images, is_main: bool) -> None:
        self.config, self.images = config, images
        self.real_labels: RealLabels | None = None
        if config.evaluation.real_labels:
            if not isinstance(images, ImageSet):
                raise UserError("--real_labels needs images with names, not a stream")
            self.real_labels = RealLabels(config.evaluation.real_labels)
            self.real_labels.check(map(images.name, range(len(images))), images.classes)
        if config.evaluation.results_file and is_main:
            open_table(config.evaluation.results_file, RESULT_COLUMNS, "--results_file").close()

    def tell(
        self, model: nn.Module, metrics: dict[str, float], rows: torch.Tensor, suffix: str
    ) -> None:
        """Log and write the results of one evaluation; `rows` are those of `Evaluation.of`."""
        folder = self.config.checkpoint.output_dir
        readable = rows.flatten(1)[:, 0] != UNREADABLE
        named = self.images if isinstance(self.images, ImageSet) else None
        files = [named.name(i) for i in readable.nonzero().flatten().tolist()] if named else []
        rows = rows[readable]
        if self.config.data.is_multi_label:
            if folder:
                tables = multi_label.write_tables(
                    Path(folder), self.images.classes, files, rows, suffix
                )
                logger.info("%s are in %s", " and ".join(path.name for path in tables), folder)
            return
        if self.real_labels:
            guesses = rows[:, 3:].long()
            acc1, acc5, count = self.real_labels.accuracy(files, guesses, self.images.classes)
            logger.info("with --real_labels on %d images: top-1 %.2f%%  top-5 %.2f%%",
                        count, acc1, acc5)  # fmt: skip
            metrics = metrics | {"acc1": acc1, "acc5": acc5}
        if self.config.data.data_set == "imagenet_c":
            errors = corruption_errors(files, rows[:, 0] == rows[:, 1])
            _tell_corruptions(errors, len(files), Path(folder) if folder else None, suffix)
        if folder:
            _write_predictions(Path(folder), self.images.classes, files, rows, suffix)
        if self.config.evaluation.results_file:
            self._add_row(model, metrics, suffix)

    def _add_row(self, model: nn.Module, metrics: dict[str, float], suffix: str) -> None:
        size, resume = self.config.model.input_size, self.config.checkpoint.resume
        name = resume if resume in timm.list_pretrained() else self.config.model.model
        name += f" ({suffix.strip('_').replace('_', ' ').upper()})" if suffix else ""
        acc1, acc5 = metrics["acc1"], metrics["acc5"]
        share = crop_pct_of(self.config.data, self.config.augment) or CROP_PCT
        share = 1.0 if is_warped(size) else share
        row = (
            name, size_text(size), f"{acc1:.3f}", f"{100 - acc1:.3f}",
            f"{acc5:.3f}", f"{100 - acc5:.3f}", f"{count_parameters(model) / 1e6:.2f}",
            f"{share:.3f}", "bicubic",
        )  # fmt: skip
        with open_table(self.config.evaluation.results_file, RESULT_COLUMNS, "--results_file") as f:
            csv.writer(f, lineterminator="\n").writerow(row)


def mean_class_accuracy(rows: torch.Tensor) -> float:
    """Return the mean of the accuracies of the classes that occur, in per cent.

    `rows` are those of `engine.evaluate`.
    """
    images, correct = _counts(rows[rows[:, 0] != UNREADABLE])
    return 100 * (correct / images)[images > 0].mean().item()


def _counts(rows: torch.Tensor, classes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, and the correct predictions, of at least so many `classes`."""
    labels, guesses = rows[:, :2].long().T
    images = torch.bincount(labels, minlength=classes)
    return images, torch.bincount(labels[labels == guesses], minlength=len(images))


def _tell_corruptions(
    errors: dict[str, dict[str, float]], count: int, folder: Path | None, suffix: str
) -> None:
    means = {name: sum(found.values()) / len(found) for name, found in errors.items()}
    for name, mean in means.items():
        logger.info("%s: error %.2f%% (%s)", name, mean,
                    "  ".join(f"{severity}: {e:.2f}%" for severity, e in errors[name].items()),
                    )  # fmt: skip
    logger.info(
        "mean error of %d corruptions: %.2f%%", len(means), sum(means.values()) / len(means)
    )
    mce = mean_corruption_error(errors)
    if mce is None:
        logger.warning("no mCE: it needs the 15 corruptions %s, each with severities 1 to %d",
                       ", ".join(ALEXNET_ERRORS), SEVERITIES)  # fmt: skip
    else:
        logger.info("mCE: %.2f%%", mce)
        groups = sum(map(len, errors.values()))
        if count != groups * IMAGES:
            logger.warning("on %d of the %d images of these corruptions", count, groups * IMAGES)
    if folder:
        lines = [(name, severity, f"{e:.3f}")
                 for name, found in errors.items() for severity, e in found.items()]  # fmt: skip
        header = ("corruption", "severity", "error")
        write_table(folder / f"corruptions{suffix}.csv", [header, *lines])


def _write_predictions(
    folder: Path, classes: list[str], files: list[str], rows: torch.Tensor, suffix: str
) -> None:
    images, correct = (counts.tolist() for counts in _counts(rows, len(classes)))
    counts = zip(classes, images, correct, strict=True)
    per_class = [(name, n, f"{100 * right / n:.2f}") for name, n, right in counts if n]
    tables: dict[str, list[tuple]] = {}
    if files:  # images of a stream have no names
        tables["predictions"] = [("file", "class", "predicted", "probability")] + [
            (file, classes[int(label)], classes[int(guess)], f"{share:.4f}")
            for file, (label, guess, share) in zip(files, rows[:, :3].tolist(), strict=True)
        ]
    tables["accuracy_per_class"] = [("class", "images", "acc1"), *per_class]
    for name, lines in tables.items():
        write_table(folder / f"{name}{suffix}.csv", lines)
    logger.info("%s are in %s", " and ".join(f"{name}{suffix}.csv" for name in tables), folder)
    worst = sorted((row for row in per_class if row[2] != "100.00"), key=lambda row: float(row[2]))
    for name, count, accuracy in worst[:3]:
        logger.info("among the worst: class %s, %s%% of %d images", name, accuracy, count)
