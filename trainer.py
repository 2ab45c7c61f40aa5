"""What a training step works with: built from the flags, saved to and restored from checkpoints."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from checkpoints.fitting import load_exactly
from checkpoints.reading import ema_weights_in, flags_in, weights_in
from config import ComputeConfig, Config, ModelConfig, OptimConfig
from loaders import build_mixup
from optim_factory import Schedule, create_optimizer, freeze, restore_optimizer
from runtime.distributed import DistributedContext, all_gather, all_reduce_sum
from runtime.errors import UserError, near_names
from runtime.logging import read_log
from utils import count_gmacs, count_parameters, versions

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it."""

    epoch: int = -1
    """The last finished epoch, counted from 0."""
    step: int = 0
    """Optimizer steps taken; also the number of updates of the moving average."""
    position: int = 0
    """Images of the next epoch that have been used, by all processes together."""
    max_accuracy: float = 0.0
    """Best top-1 of the model, in per cent."""
    max_ema_accuracy: float = 0.0
    """Best top-1 of its moving average, in per cent."""


class Meters:
    """Sums of this process that stay on the device: since the epoch began, and since a log line.

    Each is loss x images, right answers, images, gradient norms, and steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.epoch = torch.zeros(5, dtype=torch.float64, device=device)
        self.line = torch.zeros_like(self.epoch)

    def end_line(self) -> dict[str, float]:
        """The means since the last line, NaN of bad steps alone; the next line begins."""
        means = self.means(self.line)
        self.epoch += self.line
        self.line.zero_()
        return means

    def of_epoch(self) -> dict[str, float]:
        """The means of all processes since the epoch began."""
        return self.means(all_reduce_sum(self.epoch.clone()))

    @staticmethod
    def means(sums: torch.Tensor) -> dict[str, float]:
        loss, correct, images, norms, steps = sums.tolist()
        if not steps:
            return {"loss": math.nan, "class_acc": math.nan, "grad_norm": math.nan}
        return {
            "loss": loss / images,
            "class_acc": 100 * correct / images,
            "grad_norm": norms / steps,
        }


class BadSteps:
    """Steps without a finite gradient, noted on the device: nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        # in a row now, the most in a row, in all, the number of the last one
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.norms = torch.zeros(0, device=device)
        """The norm of each parameter's gradient in the last one."""
        self.parameters: list[nn.Parameter] = []
        self.told = 0
        """How many of them the log has told of."""

    @property
    def in_a_row(self) -> int:
        """How many there are in a row now; waits for the device."""
        return int(self.counts[0])

    def note(
        self,
        finite: torch.Tensor,
        parameters: list[nn.Parameter],
        norms: torch.Tensor,
        step: int,
    ) -> None:
        """Takes a step into account: whether it was finite, and the norms of its gradient."""
        bad = (~finite).long()
        in_a_row = (self.counts[0] + 1) * bad
        last = torch.where(finite, self.counts[3], step)
        self.counts = torch.stack(
            (in_a_row, self.counts[1].maximum(in_a_row), self.counts[2] + bad, last)
        )
        if not self.parameters:
            self.parameters, self.norms = parameters, torch.zeros_like(norms)
        self.norms = torch.where(finite, self.norms, norms)


@dataclass(frozen=True)
class Trainer:
    """Model, loss, optimizer and schedule of a run, and how far it has come."""

    model: nn.Module
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    optim: OptimConfig
    context: DistributedContext
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    progress: Progress
    meters: Meters
    bad_steps: BadSteps
    max_bad_steps: int
    """Bad steps in a row that end the run."""
    total_batch: int
    """Images a step, in all processes."""
    seed: int
    """What the random numbers of each step follow from, with its number."""
    precision: torch.dtype | None = None
    """What autocast computes in; None leaves it off."""
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss in float16."""

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DistributedDataParallel wrapper."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if wrapped else self.model  # type: ignore[return-value]

    @property
    def steps_of_epoch(self) -> int:
        """Steps of the next epoch that its used images stand for, with the total batch as it is."""
        taken = -(-self.progress.position // self.total_batch)
        return min(self.schedule.steps_per_epoch, taken)

    def end_epoch(self) -> None:
        """The next epoch begins."""
        self.progress.epoch += 1
        self.progress.position = 0
        self.meters.epoch.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, under the names of the published checkpoints.

        Every process has to call it: their meters are gathered. Raises UserError where weights are
        not finite any more, which nothing could go on from.
        """
        weights = dict(self.bare_model.named_parameters())
        sizes = torch.stack(torch._foreach_norm(list(weights.values()), math.inf))
        if not sizes.isfinite().all():
            name = next(n for n, s in zip(weights, sizes, strict=True) if not s.isfinite())
            raise UserError(
                f"{name} is not finite after step {self.progress.step}: see --opt_eps and --lr; "
                "checkpoints saved before are intact"
            )
        meters = torch.stack((self.meters.epoch, self.meters.line)).cpu()
        return {
            "model": self.bare_model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meters": all_gather(meters, self.context),
            "bad_steps": self.bad_steps.counts.cpu(),
            "versions": versions(),
            **asdict(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any], path: str | Path) -> None:
        """Restores `state_dict()`, read from `path`; raises UserError where it does not fit."""
        progress = _saved_progress(state, Path(path), self.schedule.config.start_epoch)
        weights = weights_in(state, path)
        load_exactly(self.bare_model, weights, path)
        if self.ema:
            ema_weights = ema_weights_in(state, path)
            if ema_weights is None:
                logger.warning("%s holds no EMA: it starts from the weights", path)
                ema_weights = weights
            load_exactly(self.ema.module, ema_weights, f"{path} (model_ema)")
        try:
            restore_optimizer(self.optimizer, state["optimizer"])
            if self.scaler and state.get("scaler"):
                if not 0 < state["scaler"]["scale"] < float("inf"):
                    raise ValueError(f"its loss scale is {state['scaler']['scale']}")
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {path} has another optimizer ({error}): give the --opt, --freeze and "
                "--layer_decay of its run, or start anew in another --output_dir"
            ) from None
        # the schedules follow the epochs, whatever the total batch of the run so far was
        for name, value in asdict(progress).items():
            setattr(self.progress, name, value)
        step = (progress.epoch + 1) * self.schedule.steps_per_epoch + self.steps_of_epoch
        if step != progress.step and "step" in state:
            logger.info(
                "%s had other steps an epoch (total batch, images): the schedules go on at step %d,"
                " not %d", path, step, progress.step,
            )  # fmt: skip
        self.progress.step = step
        if step:  # the rates of the last step, by the flags of this run
            self.schedule.apply(self.optimizer, step - 1)
        meters = state.get("meters")
        if torch.is_tensor(meters) and meters.shape[1:] == (2, *self.meters.epoch.shape):
            self._load_meters(meters)
        elif meters is not None:
            raise UserError(f"checkpoint {path} cannot be resumed: its meters are damaged")
        counts = state.get("bad_steps")
        if torch.is_tensor(counts) and counts.shape == self.bad_steps.counts.shape:
            self.bad_steps.counts.copy_(counts)
            self.bad_steps.counts[1] = 0  # with other flags the run may go on after all
            self.bad_steps.told = int(counts[2])

    def _load_meters(self, saved: torch.Tensor) -> None:
        """Of as many processes as before each has its own; of others the first has them all."""
        if len(saved) != self.context.world_size:
            whole, processes = saved.sum(0), len(saved)
            saved = torch.zeros(self.context.world_size, *whole.shape, dtype=whole.dtype)
            saved[0] = whole
            # norms and steps are those of all processes in each
            saved[0, :, 3:] *= self.context.world_size / processes
        self.meters.epoch.copy_(saved[self.context.rank, 0])
        self.meters.line.copy_(saved[self.context.rank, 1])


def _saved_progress(state: dict[str, Any], path: Path, start_epoch: int) -> Progress:
    """How far the run of a checkpoint had come.

    The release's have a word for the epoch in files that are not numbered, and know no best
    accuracy: that is read from the log.txt beside them.
    """
    epoch = state.get("epoch")
    if epoch == "start":
        epoch = -1
    elif epoch in ("best", "best-ema") and start_epoch:
        epoch = start_epoch - 1
    if not isinstance(epoch, int) or not isinstance(state.get("optimizer"), dict):
        missing = f"its epoch is {epoch!r}, not a number (see --start_epoch)"
        if isinstance(epoch, int):
            missing = "it has no state of the optimizer"
        raise UserError(
            f"checkpoint {path} cannot be resumed: {missing}; --finetune starts anew from its "
            "weights"
        )
    names = ("step", "position", "max_accuracy", "max_ema_accuracy")
    numbers = {name: state.get(name, 0) for name in names}
    counts = [epoch + 1, numbers["step"], numbers["position"]]
    if not all(isinstance(count, int) and 0 <= count < 2**60 for count in counts) or not all(
        isinstance(number, int | float) and 0 <= number <= 2**60 for number in numbers.values()
    ):
        raise UserError(f"checkpoint {path} cannot be resumed: epoch {epoch}, {numbers}?")
    if "max_accuracy" not in state and (path.parent / "log.txt").is_file():
        for record in read_log(path.parent):
            if record["epoch"] <= epoch:
                numbers |= {name: record[name] for name in numbers.keys() & record.keys()}
    return Progress(epoch, **numbers)


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """A registered model; raises UserError with near names for one that does not exist."""
    if not timm.is_model(config.model):
        hint = near_names(config.model, timm.list_models()) or "; see timm.list_models()"
        raise UserError(f"there is no model {config.model}{hint}")
    options: dict[str, Any] = {}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if config.model in timm.list_models("hornet_*"):
        options["layer_scale_init_value"] = config.layer_scale_init_value
        options["head_init_scale"] = config.head_init_scale
    try:
        return timm.create_model(
            config.model, num_classes=num_classes, **options | config.model_kwargs
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {config.model} cannot be built: {error}") from None


def prepare_model(model: nn.Module, config: ComputeConfig, device: torch.device) -> nn.Module:
    """The model on its device, laid out, checkpointed and compiled as the flags say."""
    if config.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError("--grad_checkpointing true: the model cannot")
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, NotImplementedError) as error:
            raise UserError(f"--grad_checkpointing true: the model cannot: {error}") from None
    if config.compile and config.memory == "lean":
        raise UserError("--memory lean: a compiler chooses by itself; leave out --compile true")
    asked = {"--memory lean": config.memory == "lean", "--triton true": config.triton}
    for flag, is_on in asked.items():
        if is_on and not any(isinstance(layer, models.Block) for layer in model.modules()):
            raise UserError(f"{flag}: the model cannot: it has no HorNet blocks")
    model = models.accelerate(model, config.memory, config.triton)
    # HorNets compute channels last: with weights laid out so, gradients have the strides of the
    # weights, which DistributedDataParallel wants
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    if config.compile:
        model.compile()  # in place: the names of the weights stay
    return model


def size_facts(config: ModelConfig, num_classes: int) -> dict[str, float]:
    """n_parameters and GFLOPs (multiply-adds of one image), as log.txt names them."""
    size = config.input_size
    with torch.device("meta"):
        model = build_model(config, num_classes)
        try:
            return {"n_parameters": count_parameters(model), "GFLOPs": count_gmacs(model, size)}
        except (ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"--input_size {size}: {config.model} fails: {error}") from None


def build_trainer(
    config: Config, model: nn.Module, images: int, num_classes: int, context: DistributedContext
) -> Trainer:
    """A trainer at the start of training `model` on that many images."""
    total_batch = config.total_batch(context.world_size)
    if images < total_batch:
        raise UserError(
            f"{images} training images do not fill one batch of {total_batch} (batch_size x "
            "update_freq x processes): lower --batch_size"
        )
    if config.finetune.freeze:
        frozen = freeze(model, config.finetune.freeze)
        logger.info("%d of %d parameters are frozen", frozen, count_parameters(model))
    rates = config.schedule.scaled(total_batch)
    if rates != config.schedule:
        logger.info("learning rate %.3g for a total batch of %d", rates.lr, total_batch)
    schedule = Schedule(rates, config.optim.weight_decay, images // total_batch)
    if images % total_batch:
        logger.info("%d steps an epoch, which leaves out %d of the %d images, others each time",
                    images // total_batch, images % total_batch, images)  # fmt: skip
    optimizer = create_optimizer(config.optim, model, rates.lr)
    average = None
    if config.ema.model_ema:
        device = torch.device("cpu") if config.ema.model_ema_force_cpu else context.device
        average = ModelEmaV3(model, decay=config.ema.model_ema_decay, device=device)
        if config.compute.compile:  # a copy is not compiled
            average.module.compile()
    mixup = build_mixup(config.mixup, num_classes)
    if mixup and images < config.mixup.mixup_min_images * num_classes:
        mixup = None
        logger.info("no mixup and CutMix: fewer than --mixup_min_images %d images a class",
                    config.mixup.mixup_min_images)  # fmt: skip
    # mixup turns labels into smoothed soft targets by itself
    smoothed = LabelSmoothingCrossEntropy(config.mixup.smoothing)
    criterion = SoftTargetCrossEntropy() if mixup else smoothed
    if context.is_distributed:
        on_gpu = context.device.type == "cuda"
        model = DistributedDataParallel(model, device_ids=[context.device] if on_gpu else None)
    start = config.schedule.start_epoch
    progress = Progress(epoch=start - 1, step=start * schedule.steps_per_epoch)
    precision = amp_dtype(config.compute)
    scales = precision == torch.float16
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=schedule,
        optim=config.optim,
        context=context,
        ema=average,
        mixup=mixup,
        progress=progress,
        meters=Meters(context.device),
        bad_steps=BadSteps(context.device),
        max_bad_steps=config.faults.max_bad_steps,
        total_batch=total_batch,
        seed=config.runtime.seed,
        precision=precision,
        scaler=torch.amp.GradScaler(context.device.type) if scales else None,
    )


def amp_dtype(config: ComputeConfig) -> torch.dtype | None:
    """What autocast computes in, or None without mixed precision."""
    return getattr(torch, config.amp_dtype) if config.use_amp else None


def changed_flags(state: dict[str, Any], config: Config) -> list[str]:
    """`name old -> new` of every flag that is another than in the checkpoint."""
    saved, flat = flags_in(state), config.flat()
    where = {"resume", "output_dir", "log_dir", "local_rank"}  # these name places, not a recipe
    return [
        f"{name} {saved[name]} -> {flat[name]}"
        for name in flat
        if name in saved and saved[name] != flat[name] and name not in where
    ]
