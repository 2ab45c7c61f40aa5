"""All flags, in frozen sections.

A flag is a field, written `--name value` on the command line. The docstring under it is its help
text, and its type gives its bounds.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from runtime.sizes import as_size


@dataclass(frozen=True, repr=False)
class Range:
    """Bounds of a flag: Annotated[int, Range(1)] is at least 1."""

    low: float
    high: float = math.inf

    def __repr__(self) -> str:
        no_end = self.high == math.inf
        return f"at least {self.low}" if no_end else f"from {self.low} to {self.high}"


TTA = ("flip", "crops", "scales")
"""Kinds of views of --tta."""
Positive = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = "hornet_tiny_gf"
    """Name of a model: a HorNet of models/variants.py, or any other model of timm. auto: the model
    named in the checkpoint given by finetune or resume, with its model_kwargs."""
    drop_path: Annotated[float, Range(0, 0.99)] = 0.0
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    input_size: Annotated[int | tuple[int, int], Range(1)] = 224
    """Side of the images fed to the network in pixels, or their height and width, as in
    `--input_size 224 320`."""
    layer_scale_init_value: float = 1e-6
    """Initial value of the layer scale (HorNet models)."""
    head_init_scale: float = 1.0
    """Factor on the initial weights of the classifier (HorNet models)."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model, as in '{"base_dim": 32}'."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", as_size(self.input_size))  # of a square, one number


@dataclass(frozen=True)
class FinetuneConfig:
    """Start weights"""

    finetune: str = ""
    """Weights to start from: the name of published ones, a path or a URL (.pth of this project, the
    release or timm, .safetensors, or a folder as timm saves it). Global filters are resized, a head
    for another number of classes is replaced, everything else has to fit."""
    model_key: str = "model|module"
    """Keys of the file to look for the weights under, tried in turn."""
    model_prefix: str = ""
    """Prefix to remove from the names of the weights; other names are ignored."""
    freeze: str = ""
    """Parameters not to train: a regular expression for the beginning of their names, such as
    'downsample_layers|stages.[01]', or '(?!head)' for all but the head."""


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    data_set: str = "IMNET"
    """IMNET: data_path holds train/ and val/ with the 1000 classes of ImageNet. image_folder:
    data_path holds train/ and val/, or one folder per class, as eval_data_path does. CIFAR:
    CIFAR-100, downloaded to data_path. digits: scikit-learn's handwritten digits, written to
    data_path as image folders. tar: data_path holds train.tar and val.tar, or folders of tar
    files. multi_label: data_path holds train and val as .csv or .json, which give each image any
    number of classes (TRAINING.md). wds/, hfds/NAME, hfids/NAME, tfds/NAME, torch/NAME: formats
    that timm reads. imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, imagenet_c: for
    `--eval true`."""
    data_path: str = "/path/to/dataset"
    """Folder of the data set; for hfds/ and hfids/ the cache folder, if not the default one."""
    eval_data_path: str | None = None
    """Folder of the evaluation images (image_folder only). If not given, data_path has to hold
    train/ and val/ (or validation/, test/, ...), or val_fraction is set."""
    val_fraction: Annotated[float, Range(0, 0.9)] = 0.0
    """Fraction of the images of each class to hold out for evaluation if there is no folder of
    evaluation images (image_folder only); the same images for every seed."""
    val_choice: Literal["hash", "draw"] = "hash"
    """How val_fraction chooses. hash: by class and file name, so that other images that are added
    or removed move none to the other side, except in classes of a few images. draw: as runs before
    this flag did, which continue so."""
    train_split: str = "train"
    """Training split of data sets with a prefix; for wds/ also shards with the number of images, as
    in 'train-{000..099}.tar|50000'."""
    val_split: str = "validation"
    """Evaluation split of data sets with a prefix."""
    max_images: Annotated[int | None, Range(1)] = None
    """Largest number of images for training, and for evaluation, spread evenly over the data set;
    of a stream, the images per epoch."""
    batch_size: Positive = 64
    """Images per process and micro-batch. Evaluation uses 1.5 times as many."""
    num_workers: NonNegative = 10
    """Loader workers per training process; 0 loads in the training process itself."""
    pin_mem: bool = True
    """Page-locked host memory, for faster copies to a GPU."""
    exif_orientation: bool | None = None
    """Turn images as their EXIF metadata say. If not given: for image_folder and tar, but not for
    published data sets, so that published accuracies hold. Not for data sets with a prefix."""
    background: str = "white"
    """Colour under transparent pixels, as a name or '#808080'; none drops the transparency, as the
    original release did. Not for CIFAR and data sets with a prefix."""
    in_chans: Positive = 3
    """Channels of the images and of the network. 3: RGB, into which files are converted; 1: grey,
    likewise; others: files with so many channels. With other than 3, or with value_range, images
    are arrays, for `--aa none --color_jitter 0` (folders, tar and multi_label)."""
    value_range: tuple[float, float] | None = None
    """Pixel values that become 0 and 1 before the normalisation; others are clipped. Float images
    need it; if not given, it is that of 8 or 16 bits."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, or one for all, of values from 0 to 1. If not given: see
    imagenet_default_mean_and_std, and 0.5 for other than three channels."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, or one for all, given together with mean."""
    imagenet_default_mean_and_std: bool = True
    """Normalise by ImageNet's mean and standard deviation; false: by 0.5 and 0.5 (Inception)."""
    nb_classes: int = 1000
    """Number of classes, for data sets that don't name them (wds/)."""

    @property
    def as_arrays(self) -> bool:
        """Whether images are arrays, not 8-bit RGB."""
        return self.in_chans != 3 or self.value_range is not None

    @property
    def is_multi_label(self) -> bool:
        return self.data_set == "multi_label"

    @property
    def metric(self) -> str:
        """Name of the metric, in per cent, that tells the best checkpoint."""
        return "mAP" if self.is_multi_label else "acc1"

    @property
    def has_path(self) -> bool:
        return self.data_path != DataConfig.data_path


@dataclass(frozen=True)
class SamplingConfig:
    """Order of the training images"""

    aug_repeats: Positive = 1
    """Repeated augmentation: so many views of each image follow one another, and an epoch has as
    many images as before, so not all of the data set."""
    class_balanced: bool = False
    """Draw the images of an epoch so that each class has the same number of them, with
    repetitions."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation"""

    scale: tuple[float, float] | None = None
    """Area of the random crop as a fraction of the image; 0.08 1 if not given, but inputs of up to
    32 pixels are then padded by 4 and cropped at their own scale."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength of the colour jitter, used with `--aa none` and `--aa 3a` only."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy in timm's notation, 3a for 3-Augment, or none."""
    train_interpolation: Literal[
        "bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random"
    ] = "bicubic"
    """Interpolation of training images; random: bilinear or bicubic."""
    crop_pct: Annotated[float | None, Range(0.01, 1)] = None
    """Fraction of the short side that the evaluation's centre crop keeps; 224/256 if not given.
    Inputs of 384 pixels and more are warped to a square instead."""
    reprob: Probability = 0.25
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """Content of an erased rectangle."""
    recount: Annotated[int, Range(1, 100)] = 1
    """Largest number of rectangles erased."""
    size_schedule: tuple[str, ...] = ()
    """Progressive resizing: sizes of the training images from an epoch on, as in
    `--size_schedule 128@0 160@10 224@20`; the last one is input_size. Evaluation has input_size."""
    fast_decode: bool = False
    """Read training images faster, to slightly other pixels than the release: JPEGs are decoded no
    larger than the random crop needs, and OpenCV resizes, turns, shears and shifts. Needs the extra
    'fast'. Evaluation, and inputs of up to 32 pixels, are not affected."""
    resplit: bool = False
    """Unused, as in the original release."""

    @property
    def size_steps(self) -> list[tuple[int, int]]:
        """First epoch, and size of the training images, of each part of size_schedule."""
        return [
            (int(epoch), int(size)) for size, epoch in (s.split("@") for s in self.size_schedule)
        ]


@dataclass(frozen=True)
class MixupConfig:
    """Mixup, CutMix and label smoothing"""

    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup; 0 switches it off."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix; 0 switches it off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Bounds of the cut's side as fractions of the image; they replace the alpha of CutMix."""
    mixup_prob: Probability = 1.0
    """Probability of mixing a batch."""
    mixup_switch_prob: Probability = 0.5
    """Probability of CutMix if both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw the mixing per batch, per pair, or per image."""
    mixup_min_images: NonNegative = 0
    """No mixing with fewer training images per class than this, on average."""
    smoothing: Annotated[float, Range(0, 0.99)] = 0.1
    """Label smoothing."""

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class LossConfig:
    """Loss"""

    loss: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """Loss of training; bce: binary cross entropy of each class."""
    bce_target_thresh: Annotated[float | None, Range(0, 1)] = None
    """With bce: soft targets above it become 1, others 0."""
    focal_gamma: NonNegativeFloat = 2.0
    """With focal: the exponent that weakens the terms of well classified images."""
    focal_alpha: Annotated[float, Range(-1, 1)] = 0.25
    """With focal: the weight of targets, and 1 - alpha of other classes; -1 for no weights."""
    class_weights: str = ""
    """Factors on the loss of each class as a target. balanced: the same total weight for each class
    in the training images; or a JSON or YAML file of weights, as a list or by class name."""


@dataclass(frozen=True)
class DistillConfig:
    """Distillation"""

    teacher: str = ""
    """Trained model to learn from: a checkpoint, or the name of published weights, of timm too. It
    sees the same augmented images, resized to its own size and normalised by its own mean."""
    distill: Literal["soft", "hard", "features"] = "soft"
    """What is learnt: the teacher's probabilities (soft), its predicted class (hard), or its pooled
    features, to which a linear layer projects those of the model."""
    distill_alpha: Probability = 0.5
    """Weight of the teacher's part of the loss; the loss on the labels has 1 - distill_alpha."""
    distill_temperature: Annotated[float, Range(0.01)] = 1.0
    """Temperature of both probabilities (soft)."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    # optim_factory.create_optimizer passes them on; a name is that of the optimizer's own option,
    # or opt_ and it, so that a resumed run takes it from the flags
    opt: str = "adamw"
    """Optimizer, by its name in timm."""
    opt_eps: Annotated[float | None, Range(0)] = 1e-8
    """Epsilon of the optimizer."""
    opt_betas: tuple[float, ...] | None = None
    """Betas of the optimizer, as in `--opt_betas 0.9 0.95`; its own default if not given."""
    momentum: Probability = 0.9
    """Momentum of optimizers that have one."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; 1-D parameters (norms, biases, layer scale) have none without decay_1d."""
    decay_1d: bool = False
    """Weight decay for 1-D parameters, too."""
    update_freq: Positive = 1
    """Micro-batches per optimizer step, whose gradients are accumulated."""
    clip_grad: float | None = None
    """Largest 2-norm of the gradient; no clipping if not given."""
    clip_mode: Literal["step", "micro"] = "step"
    """step: clip the accumulated gradient once per step. micro: clip the running sum after each
    micro-batch, as the original release did in float32."""
    layer_decay: Annotated[float, Range(1e-3, 1)] = 1.0
    """Factor on the learning rate per layer group, from the last group to the first."""
    layer_decay_min: Probability = 0.0
    """Smallest factor on the learning rate of a layer group."""
    opt_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, as in '{"nesterov": true}'."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule"""

    epochs: Positive = 300
    """Passes over the training images."""
    start_epoch: NonNegative = 0
    """First epoch, counted from 0; a resumed checkpoint overrides it."""
    lr: NonNegativeFloat = 4e-3
    """Learning rate after the warm-up."""
    lr_base_batch: Annotated[int | None, Range(1)] = None
    """Total batch that lr and min_lr are given for: they are multiplied by the actual total batch
    divided by this one. Not scaled if not given."""
    min_lr: NonNegativeFloat = 1e-6
    """Smallest learning rate after the warm-up, at which cosine, linear and wsd end."""
    sched: Literal["cosine", "linear", "wsd", "step", "plateau", "constant"] = "cosine"
    """Course of the learning rate after the warm-up. wsd: constant, then 1 - sqrt over the last
    decay_epochs. step: times decay_rate every decay_epochs. plateau: times decay_rate whenever
    more than patience_epochs evaluations in a row have not improved the top-1 accuracy."""
    decay_epochs: Annotated[float | None, Range(0.01)] = None
    """Epochs of a step, or of the last phase of wsd; a fifth of the epochs if not given."""
    decay_rate: Annotated[float, Range(0, 0.999)] = 0.1
    """Factor on the learning rate (step and plateau)."""
    patience_epochs: NonNegative = 10
    """Evaluations without an improvement that plateau allows."""
    cooldown_epochs: NonNegative = 0
    """The last ones of the epochs, which have the learning rate min_lr."""
    warmup_epochs: NonNegative = 20
    """Epochs of linear warm-up from 0."""
    warmup_steps: int = -1
    """Optimizer steps of warm-up; if positive, overrides warmup_epochs."""
    weight_decay_end: float | None = None
    """Weight decay at the end of its cosine; constant if not given."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """epoch: the learning rate changes between epochs only, and as in P2P one epoch late: the first
    two epochs have the first one."""

    def scaled(self, total_batch: int) -> "ScheduleConfig":
        """Return the schedule with its learning rates scaled to `total_batch`."""
        factor = total_batch / (self.lr_base_batch or total_batch)
        return replace(self, lr=factor * self.lr, min_lr=factor * self.min_lr, lr_base_batch=None)

    def warmup(self, steps_per_epoch: int) -> int:
        """Warm-up in optimizer steps."""
        return self.warmup_steps if self.warmup_steps > 0 else self.warmup_epochs * steps_per_epoch


@dataclass(frozen=True)
class EmaConfig:
    """EMA of the weights"""

    model_ema: bool = False
    """Keep an exponential moving average of the weights."""
    model_ema_decay: Probability = 0.9999
    """Decay of the EMA per optimizer step."""
    model_ema_warmup: bool = False
    """Begin with smaller decays: at most 1 - (1 + step) ** (-2 / 3)."""
    model_ema_more: tuple[float, ...] = ()
    """Decays of further EMAs, as in `--model_ema_more 0.99 0.999`: saved, and evaluated after each
    epoch, as the first one is, but none of their checkpoints is kept as the best."""
    model_ema_force_cpu: bool = False
    """Keep the EMA in host memory."""
    model_ema_eval: bool = False
    """Evaluate the EMA, too."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    output_dir: str = ""
    """Folder for checkpoints, log.txt, config.yaml and curves.png; without it nothing is saved."""
    resume: str = ""
    """Checkpoint to resume, or to evaluate with `--eval true`: a path or a URL; for evaluation also
    the name of published weights. After a restart by torchrun or Slurm, the newest checkpoint of
    output_dir is resumed instead."""
    auto_resume: bool = True
    """Resume the newest undamaged checkpoint of output_dir, if there is one."""
    save_ckpt: bool = True
    """Save checkpoints."""
    save_frozen: bool = True
    """Save frozen weights, too; false: who loads a checkpoint reads them from --finetune again."""
    save_ckpt_freq: Positive = 1
    """Epochs between checkpoints."""
    save_ckpt_num: Positive = 3
    """Number of numbered checkpoints kept, in addition to epochs 50, 100, 150, ..."""
    save_ckpt_steps: NonNegative = 0
    """Optimizer steps between checkpoints inside an epoch; 0 for none."""
    save_ckpt_minutes: NonNegativeFloat = 0.0
    """Minutes between checkpoints inside an epoch; 0 for none."""


@dataclass(frozen=True)
class FaultConfig:
    """Faults"""

    max_bad_steps: Positive = 20
    """Non-finite steps in a row that end the run at its next log line; such steps are skipped."""
    max_bad_images: NonNegative = 100
    """Largest number of unreadable images; with more of them the run ends. They are listed in
    bad_images.txt; training replaces each by another of its class, evaluation leaves it out."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    eval: bool = False
    """Evaluate the checkpoint given by resume, and exit."""
    dist_eval: bool = True
    """Share the evaluation among the processes; each image counts once either way."""
    disable_eval: bool = False
    """Train without evaluating."""
    eval_freq: Positive = 1
    """Epochs between evaluations during training; the last epoch has one, too."""
    tta: tuple[str, ...] = ()
    """With `--eval true`: test-time augmentation, some of flip (the image and its mirror image),
    crops (its corners and its centre, of the area without crop_pct) and scales (input_size, and 32
    pixels more and less). The probabilities of all combinations are averaged."""
    real_labels: str = ""
    """With `--eval true` on the validation images of ImageNet-1K: the file real.json of "Are we
    done with ImageNet?", or timm for its copy in timm. Accuracy by these labels, too."""
    results_file: str = ""
    """With `--eval true`: a CSV file that gets a row in the columns of timm's results-*.csv; with
    real_labels, of the accuracy by these."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_dir: str | None = None
    """Folder for TensorBoard events; none are written without it."""
    log_interval: Positive = 10
    """Optimizer steps per log line."""
    enable_wandb: bool = False
    """Log to Weights & Biases; needs the package wandb."""
    project: str = "hornet"
    """Project in Weights & Biases."""
    exp_name: str = "default"
    """Name of the run in Weights & Biases."""
    wandb_ckpt: bool = False
    """Upload the checkpoints of output_dir to Weights & Biases at the end."""


@dataclass(frozen=True)
class ComputeConfig:
    """Computation"""

    use_amp: bool = False
    """Mixed precision: convolutions and matrix products in amp_dtype."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Data type of mixed precision; float16 scales the loss, and skips steps that overflow."""
    channels_last: bool = True
    """Channels-last memory layout of the weights, in which HorNets compute."""
    compile: bool = False
    """Compile the model by torch.compile; the first step of each shape takes long."""
    triton: bool = False
    """GPU kernels of this project (HorNet models): depthwise convolutions, global filters, and in
    evaluation the first and last products of gnConv. PyTorch's operators replace them where Triton
    or a shape doesn't allow them; `python -m benchmarks` compares their speed."""
    sync_bn: bool = False
    """Batch norms with the statistics of all processes, for models that have batch norms."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: slower, less memory."""
    memory: Literal["normal", "lean"] = "normal"
    """lean: recompute only the cheap activations, for about half the memory (HorNet models)."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Machine"""

    device: str = "auto"
    """auto (a GPU if there is one), cuda or cpu."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of all random numbers."""
    deterministic: bool = False
    """Deterministic algorithms, on GPUs too, which may be slower; operations that have none are
    named in warnings. false searches the fastest convolutions, as the release did. On CPUs, equal
    runs give equal results either way."""
    smoke: bool = False
    """Shrink the run to seconds, to see that it works: two epochs of 256 images, a tiny HorNet, no
    start weights, into OUTPUT_DIR-smoke; on digits if data_path is not given."""


@dataclass(frozen=True)
class ProcessConfig:
    """Processes"""

    local_rank: int = -1
    """Set by torch.distributed.launch; the environment's LOCAL_RANK overrides it."""
    world_size: int = 1
    """Number of processes started by srun, ranked by SLURM_PROCID; torchrun sets its own."""
    dist_url: str = "env://"
    """Rendezvous: env:// (MASTER_ADDR and MASTER_PORT), tcp://HOST:PORT or file://PATH."""
    dist_timeout: Annotated[float, Range(0.01)] = 30.0
    """Minutes that a process waits for the others before the run ends."""
    dist_on_itp: bool = False
    """Ranks from Open MPI (OMPI_COMM_WORLD_RANK, _SIZE and _LOCAL_RANK)."""


@dataclass(frozen=True)
class Config:
    """All sections; the command line and recipes name only their fields."""

    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)

    def total_batch(self, processes: int) -> int:
        """Images per optimizer step."""
        return self.data.batch_size * self.optim.update_freq * processes

    def wandb_options(self) -> dict[str, Any] | None:
        """Return the arguments of wandb.init, or None without --enable_wandb."""
        log, folder = self.logging, self.checkpoint.output_dir or None
        if not log.enable_wandb:
            return None
        return {"project": log.project, "name": log.exp_name, "config": self.flat(), "dir": folder}

    def flat(self) -> dict[str, Any]:
        """Return all flags as plain values, for YAML and checkpoints."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for section in asdict(self).values()
            for name, value in section.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the flags as a recipe that `--config` reads."""
        Path(path).write_text(yaml.safe_dump(self.flat(), sort_keys=False))


def sections_of(kind: type[Config] = Config) -> dict[str, type]:
    return {f.name: f.type for f in fields(kind)}  # type: ignore[misc]
