"""The model of a run, its initial TrainState, and its constant TrainSetup."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

import models
from checkpoints import fitting, reading, sources
from config.flags import ComputeConfig, Config, MixupConfig, ModelConfig
from input_pipeline.image_sets import Images
from optim_factory import Schedule, create_optimizer, freeze
from runtime.distributed import DistributedContext
from runtime.errors import UserError, near_names, reason_of
from runtime.sizes import sides
from training.distillation import Distillation, Student
from training.loss import Loss, build_loss, class_weights_of
from training.nonfinite import NonFiniteSteps
from training.state import Meters, Progress, TrainState
from training.sync_bn import synchronise_batch_norms
from utils import are_names, count_parameters, gmacs_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSetup:
    """What a training step needs besides the TrainState."""

    config: Config
    context: DistributedContext
    total_batch: int
    """Images per optimizer step, of all ranks."""
    schedule: Schedule
    mixup: Mixup | None
    criterion: Loss
    distillation: Distillation | None
    precision: torch.dtype | None
    """dtype of autocast; None for no autocast."""
    start_weights: frozenset[str] = frozenset()
    """Names of the weights that were read from --finetune."""

    def steps_taken(self, progress: Progress) -> int:
        """Return how many steps of the current epoch are done, by the images used."""
        return min(self.schedule.steps_per_epoch, math.ceil(progress.position / self.total_batch))


def check_name(model: str) -> None:
    """Raise UserError, with similar names, if timm has no model of this name."""
    if not timm.is_model(model):
        hint = near_names(model, timm.list_models()) or "; see timm.list_models()"
        raise UserError(f"there is no model {model}{hint}")


def build_model(config: ModelConfig, num_classes: int, in_chans: int = 3) -> nn.Module:
    """Build a registered model; UserError if there is none of this name, or it cannot be built."""
    check_name(config.model)
    options: dict[str, Any] = {}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if config.model in timm.list_models("hornet_*"):
        options["layer_scale_init_value"] = config.layer_scale_init_value
        options["head_init_scale"] = config.head_init_scale
    if in_chans != 3:
        options["in_chans"] = in_chans
    options |= config.model_kwargs
    try:
        return timm.create_model(config.model, num_classes=num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {config.model} cannot be built: {error}") from None


def prepare_model(model: nn.Module, config: ComputeConfig, device: torch.device) -> nn.Module:
    """Accelerate, move and compile a model as the flags say."""
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"--grad_checkpointing true: this model can't: {error}") from None
    if config.sync_bn:
        synchronise_batch_norms(model)
    if config.compile and config.memory == "lean":
        raise UserError("--memory lean has no effect with --compile true: choose one of them")
    has_blocks = any(isinstance(layer, models.Block) for layer in model.modules())
    for flag, on in (("--memory lean", config.memory == "lean"), ("--triton true", config.triton)):
        if on and not has_blocks:
            raise UserError(f"{flag}: this model can't, it has no HorNet blocks")
    model = models.accelerate(model, config.memory, config.triton)
    # in the layout of the computation, gradients have the strides of their weights, as
    # DistributedDataParallel expects
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    # as in the release: nearly all batches have one shape, whose fastest convolution is searched
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if config.compile:
        _try_compiler(device)
        model.compile()  # in place, so that the names of the weights stay
    return model


def _try_compiler(device: torch.device) -> None:
    """Compile one addition; UserError if there is no compiler, or no folder for its results."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # many types, with pages of text
        reason = reason_of(getattr(error, "inner_exception", error))
        raise UserError(
            "--compile true: nothing can be compiled here, it needs a C++ compiler and a writable "
            f"TORCHINDUCTOR_CACHE_DIR: {reason}"
        ) from None


def amp_dtype(config: ComputeConfig) -> torch.dtype | None:
    """Return the dtype of autocast, or None without mixed precision."""
    return getattr(torch, config.amp_dtype) if config.use_amp else None


def size_facts(config: ModelConfig, num_classes: int, in_chans: int = 3) -> dict[str, float]:
    """Return n_parameters and GFLOPs (multiply-adds per image), as they are named in log.txt.

    A model may have an `example_input()`. GFLOPs are left out if they cannot be counted. Raises
    UserError if the model does not take images of --input_size and so many channels.
    """
    size = config.input_size
    with torch.device("meta"), torch.no_grad():
        # the counter fails on parameters with gradients that are inputs of layers (CaiT, PiT)
        model = build_model(config, num_classes, in_chans).eval().requires_grad_(False)
        own = getattr(model, "example_input", None)
        example = own() if own else torch.empty(1, in_chans, *sides(size))  # type: ignore[operator]
        try:
            model(example)
        except (ValueError, RuntimeError, AssertionError) as error:
            channels = config.model_kwargs.get("in_chans", in_chans)
            if channels != in_chans:
                raise UserError(
                    f"--model_kwargs: in_chans is {channels}, but images have {in_chans} channels: "
                    f"give --in_chans {channels} instead"
                ) from None
            shown = " ".join(map(str, sides(size) if isinstance(size, tuple) else (size,)))
            raise UserError(f"--input_size {shown}: {config.model} fails: {error}") from None
    facts: dict[str, float] = {"n_parameters": count_parameters(model)}
    try:
        facts["GFLOPs"] = sum(gmacs_of(model, example)[""])
    except Exception as error:  # of operators that the counter does not know
        logger.warning("GFLOPs of %s are not counted: %s", config.model, reason_of(error))
    return facts


def check_size_schedule(config: Config, num_classes: int, facts: dict[str, float]) -> None:
    """Log the share of work that --size_schedule takes; UserError for a size that fails.

    `facts` are those of the full size.
    """
    steps = config.augment.size_steps
    ends = [epoch for epoch, _ in steps[1:]] + [config.schedule.epochs]
    work = 0.0
    for (start, size), end in zip(steps, ends, strict=True):
        try:
            found = size_facts(
                replace(config.model, input_size=size), num_classes, config.data.in_chans
            )
        except UserError as error:
            raise UserError(f"--size_schedule: {error}") from None
        work += (end - start) * found.get("GFLOPs", math.nan)
    share = work / (config.schedule.epochs * facts.get("GFLOPs", math.nan))
    if math.isfinite(share):
        logger.info("--size_schedule: %.0f%% of the work of %d pixels in all epochs", 100 * share,
                    config.model.input_size)  # fmt: skip


def build_training(
    config: Config,
    model: nn.Module,
    images: int,
    num_classes: int,
    context: DistributedContext,
    class_weights: torch.Tensor | None = None,
    distillation: Distillation | None = None,
) -> tuple[TrainState, TrainSetup]:
    """Return the initial state and the setup for training `model` on that many images."""
    total_batch = config.total_batch(context.world_size)
    schedule = _build_schedule(config, images, total_batch)
    if config.finetune.freeze:
        freeze(model, config.finetune.freeze)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        logger.info("%d of %d parameters are frozen", frozen, count_parameters(model))
    student, projection = model, None
    if distillation and distillation.by_features:
        if not hasattr(model, "head_hidden_size"):
            raise UserError("--distill features: the model does not tell the width of its features")
        student = Student(model, distillation.teacher.num_features).to(context.device)
        projection = student.projection
        if config.compute.compile:
            student.compile()
    optimizer = create_optimizer(config.optim, model, schedule.config.lr, projection)
    emas = {}
    if config.ema.model_ema:
        decays = {"ema": config.ema.model_ema_decay}
        decays |= {f"ema_{decay}": decay for decay in config.ema.model_ema_more}
        device = torch.device("cpu") if config.ema.model_ema_force_cpu else context.device
        warmup = config.ema.model_ema_warmup
        for name, decay in decays.items():
            emas[name] = ModelEmaV3(model, decay=decay, use_warmup=warmup, device=device)
            if config.compute.compile:  # a copy is not compiled
                emas[name].module.compile()
    mixup = build_mixup(config.mixup, num_classes)
    if mixup and images < config.mixup.mixup_min_images * num_classes:
        mixup = None
        logger.info("no mixup and CutMix: fewer than --mixup_min_images %d images per class",
                    config.mixup.mixup_min_images)  # fmt: skip
    if class_weights is not None:
        class_weights = class_weights.to(context.device)
    criterion = build_loss(config.loss, config.mixup.smoothing, bool(mixup), class_weights)
    if context.is_distributed:
        devices = [context.device] if context.device.type == "cuda" else None
        # a view saves a copy of all gradients, and the memory for it
        student = nn.parallel.DistributedDataParallel(
            student, device_ids=devices, gradient_as_bucket_view=True
        )
    precision = amp_dtype(config.compute)
    scaler = torch.amp.GradScaler(context.device.type) if precision == torch.float16 else None
    start = config.schedule.start_epoch
    progress = Progress(epoch=start - 1, step=start * schedule.steps_per_epoch)
    nonfinite = NonFiniteSteps(context.device, config.faults.max_bad_steps)
    meters = Meters(context.device)
    state = TrainState(student, emas, optimizer, scaler, progress, meters, nonfinite)
    setup = TrainSetup(
        config, context, total_batch, schedule, mixup, criterion, distillation, precision
    )
    return state, setup


def _build_schedule(config: Config, images: int, total_batch: int) -> Schedule:
    if images < total_batch:
        raise UserError(
            f"{images} training images do not fill one batch of {total_batch} (batch_size x "
            "update_freq x processes): lower --batch_size"
        )
    rates = config.schedule.scaled(total_batch)
    if rates != config.schedule:
        logger.info("learning rate %.3g for a total batch of %d", rates.lr, total_batch)
    if images % total_batch:
        logger.info("%d steps per epoch, which skip %d of the %d images, different ones each time",
                    images // total_batch, images % total_batch, images)  # fmt: skip
    return Schedule(rates, config.optim.weight_decay, images // total_batch)


def build_mixup(config: MixupConfig, num_classes: int) -> Mixup | None:
    """Return timm's Mixup, which turns labels into smoothed soft targets; None if it is off."""
    if not config.enabled:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def start_training(
    config: Config,
    model: nn.Module,
    images: Images,
    classes: list[str],
    resume_from: str,
    context: DistributedContext,
    distillation: Distillation | None = None,
) -> tuple[TrainState, TrainSetup]:
    """Like `build_training`, with the weights of --finetune or the state of `resume_from`.

    Raises UserError if the checkpoint can't be read or doesn't fit.
    """
    read: frozenset[str] = frozenset()
    if config.finetune.finetune and not resume_from:
        named = are_names(classes, config.data.data_set)
        read = fitting.load_start_weights(model, config.finetune, classes, context, named)
    weights = class_weights_of(config.loss, images, classes)
    state, setup = build_training(
        config, model, images.length, len(classes), context, weights, distillation
    )
    setup = replace(setup, start_weights=read)
    if not resume_from:
        return state, setup
    saved = reading.read_checkpoint(sources.local_file(resume_from, context), model)
    old, places = reading.flags_in(saved), ("resume", "output_dir", "log_dir", "local_rank")
    for name, value in config.flat().items():
        if old.get(name, value) != value and name not in places:
            logger.info("flag changed since %s: %s %s -> %s", resume_from, name, old[name], value)
    state.load_state_dict(saved, resume_from, context, config.finetune, config.optim.opt_args)
    setup = replace(setup, start_weights=frozenset(saved.get("left_out") or {}))
    if config.finetune.finetune and not setup.start_weights:
        logger.info("--finetune is not read again: %s is resumed", resume_from)
    continue_schedules(state, setup, resume_from, "step" in saved)
    return state, setup


def continue_schedules(state: TrainState, setup: TrainSetup, path: str, knows_step: bool) -> None:
    """Set step and learning rates by the epochs done, even if the total batch has changed."""
    progress, schedule = state.progress, setup.schedule
    step = (progress.epoch + 1) * schedule.steps_per_epoch + setup.steps_taken(progress)
    if step != progress.step and knows_step:
        logger.info("%s had other steps per epoch (total batch, images): the schedules continue at "
                    "step %d, not %d", path, step, progress.step)  # fmt: skip
    progress.step = step
    if step:
        schedule.apply(state.optimizer, step - 1, progress.rate_factor)
    logger.info("resumed %s at epoch %d, after %d of its images", path, progress.epoch + 1,
                progress.position)  # fmt: skip
