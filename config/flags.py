"""Every flag, once, in frozen sections.

A flag is a field below and is written `--name value`; the docstring under it is its help text, and
its type holds its bounds.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml


@dataclass(frozen=True, repr=False)
class Range:
    """The smallest and the largest value of a flag, in its type: Annotated[int, Range(1)]."""

    low: float
    high: float = math.inf

    def __repr__(self) -> str:
        return (
            f"at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
        )


Positive = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = "hornet_tiny_gf"
    """Name of a registered model: the HorNets of models/variants.py, or any other of timm. auto:
    the one that the checkpoint given by finetune or resume names, with its model_kwargs."""
    drop_path: Annotated[float, Range(0, 0.99)] = 0.0
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    input_size: Positive = 224
    """Height and width of the images fed to the network, in pixels."""
    layer_scale_init_value: float = 1e-6
    """Initial value of the layer scale (HorNet models)."""
    head_init_scale: float = 1.0
    """Factor on the initial weights of the classifier (HorNet models)."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model, such as '{"base_dim": 32}'."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Start weights"""

    finetune: str = ""
    """Weights to start from: the name of published ones, a path or an address (a .pth of this
    project, the release or timm, .safetensors, or a folder in the form of timm). Global filters are
    resized; a head of another class count is replaced; everything else has to fit."""
    model_key: str = "model|module"
    """Entries of the file to look for the weights in, tried in turn; else the file itself."""
    model_prefix: str = ""
    """Prefix of the weights' names in the file, which is removed."""
    freeze: str = ""
    """Parameters that are not trained: a regular expression that their names begin with, such as
    'downsample_layers|stages.[01]', or '(?!head)' for all but the head."""


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    data_set: str = "IMNET"
    """IMNET: data_path holds train/ and val/ with the 1000 classes of ImageNet. image_folder:
    data_path and eval_data_path hold one folder per class. CIFAR: CIFAR-100, downloaded to
    data_path. digits: scikit-learn's handwritten digits, written to data_path as image folders when
    they are not there. tar: data_path holds train.tar and val.tar, or folders of tar files. wds/,
    hfds/NAME, hfids/NAME, tfds/NAME, torch/NAME: what timm reads by these prefixes."""
    data_path: str = "/path/to/dataset"
    """Folder of the data set; for hfds/ and hfids/ the cache, if another than the default."""
    eval_data_path: str | None = None
    """Folder of the evaluation images (image_folder only); if not given, data_path has to hold
    train/ and val/, or val_fraction says how many to hold out."""
    val_fraction: Annotated[float, Range(0, 0.9)] = 0.0
    """Fraction of each class's images that is held out for evaluation, where there is no other
    folder of them (image_folder only). The same images for every seed."""
    train_split: str = "train"
    """Split to train on, of the data sets with a prefix. For wds/ also shards, as in
    'train-{000..099}.tar|50000', with the number of images."""
    val_split: str = "validation"
    """Split to evaluate on, of the data sets with a prefix."""
    max_images: Annotated[int | None, Range(1)] = None
    """Use only that many images, spread evenly over the data set, of those for training and of
    those for evaluation; all if not given. For a stream: how many make an epoch."""
    batch_size: Positive = 64
    """Images per process and micro-batch. Evaluation uses one and a half times as many."""
    num_workers: NonNegative = 10
    """Loader workers per training process; 0 loads in the training process itself."""
    pin_mem: bool = True
    """Page-locked host memory for faster copies to a GPU."""
    imagenet_default_mean_and_std: bool = True
    """Normalise by ImageNet's mean and standard deviation; otherwise by 0.5 and 0.5, as Inception
    does."""
    nb_classes: int = 1000
    """Number of classes of a data set that does not say it (wds/); all others say it themselves."""

    @property
    def has_path(self) -> bool:
        """Whether data_path was given at all."""
        return self.data_path != DataConfig.data_path


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation"""

    scale: tuple[float, float] | None = None
    """Area of the random crop as a fraction of the image. If not given: 0.08 1 for inputs of more
    than 32 pixels; smaller inputs are padded by 4 and cropped at their own scale."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength of the colour jitter; timm uses it only where aa is none."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy in timm's notation, or none."""
    train_interpolation: Literal[
        "bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random"
    ] = "bicubic"
    """Interpolation of resized training images; random draws bilinear or bicubic."""
    crop_pct: Annotated[float | None, Range(0.01, 1)] = None
    """Fraction of the evaluation image's short side that the centre crop keeps; 224/256 if not
    given. Inputs of 384 pixels and more are warped to the square instead."""
    reprob: Probability = 0.25
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What fills an erased rectangle."""
    recount: Annotated[int, Range(1, 100)] = 1
    """Largest number of rectangles erased."""
    fast_decode: bool = False
    """Decode training images faster, with other pixels than the release: JPEGs of folders no
    larger than the random crop needs, crops resized by OpenCV. Needs the extra 'fast'. Evaluation
    images stay exact, and so do inputs of up to 32 pixels."""
    resplit: bool = False
    """Unused, as in the original release."""


@dataclass(frozen=True)
class MixupConfig:
    """Mixup, CutMix and label smoothing"""

    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup; 0 switches it off."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix; 0 switches it off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Bounds of the cut's side as fractions of the image; they switch CutMix on, without alpha."""
    mixup_prob: Probability = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: Probability = 0.5
    """Probability of CutMix where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Whether the mixing is drawn once per batch, per pair, or per image."""
    mixup_min_images: NonNegative = 0
    """No mixing for data sets with fewer training images per class than this, on average."""
    smoothing: Annotated[float, Range(0, 0.99)] = 0.1
    """Label smoothing."""

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    opt: str = "adamw"
    """Optimizer, by its name in timm."""
    opt_eps: Annotated[float | None, Range(0)] = 1e-8
    """Epsilon of the optimizer."""
    opt_betas: tuple[float, ...] | None = None
    """Betas of the optimizer, written `--opt_betas 0.9 0.95`; its own default if not given."""
    momentum: Probability = 0.9
    """Momentum of optimizers that have one."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; 1-D parameters (norms, biases, layer scale) have none."""
    update_freq: Positive = 1
    """Micro-batches whose gradients are accumulated for one optimizer step."""
    clip_grad: float | None = None
    """Largest 2-norm of the gradient; no clipping if not given."""
    clip_mode: Literal["step", "micro"] = "step"
    """step: clip the whole accumulated gradient once per step. micro: clip the running sum after
    every micro-batch, as the original release did in float32."""
    layer_decay: Annotated[float, Range(1e-3, 1)] = 1.0
    """Factor on the learning rate from one layer group to the one before it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule"""

    epochs: Positive = 300
    """Passes over the training images."""
    start_epoch: NonNegative = 0
    """Epoch to start from, counted from 0; that of a resumed checkpoint overrides it."""
    lr: NonNegativeFloat = 4e-3
    """Learning rate after the warm-up, for the total batch as it is; see lr_base_batch."""
    lr_base_batch: Annotated[int | None, Range(1)] = None
    """Total batch that lr and min_lr are meant for: both are multiplied by the actual total batch
    over this one. Not scaled if not given."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: NonNegative = 20
    """Epochs of linear warm-up from 0."""
    warmup_steps: int = -1
    """Optimizer steps of warm-up; overrides warmup_epochs where it is positive."""
    weight_decay_end: float | None = None
    """Weight decay at the end of its cosine; constant if not given."""

    def scaled(self, total_batch: int) -> "ScheduleConfig":
        """The schedule with its rates for `total_batch`, as lr_base_batch asks."""
        if self.lr_base_batch is None:
            return self
        factor = total_batch / self.lr_base_batch
        return replace(self, lr=factor * self.lr, min_lr=factor * self.min_lr, lr_base_batch=None)

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.epochs * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Warm-up in optimizer steps."""
        return self.warmup_steps if self.warmup_steps > 0 else self.warmup_epochs * steps_per_epoch


@dataclass(frozen=True)
class EmaConfig:
    """EMA of the weights"""

    model_ema: bool = False
    """Keep an exponential moving average of the weights."""
    model_ema_decay: Probability = 0.9999
    """Decay of the EMA at each optimizer step."""
    model_ema_force_cpu: bool = False
    """Keep the EMA in host memory."""
    model_ema_eval: bool = False
    """Evaluate the EMA beside the model."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    output_dir: str = ""
    """Folder of checkpoints, log.txt, config.yaml and curves.png; nothing is saved without it."""
    resume: str = ""
    """Checkpoint to resume, or to evaluate with `--eval true`: a path or an address; to evaluate,
    also the name of published weights. A run that was restarted by torchrun or Slurm resumes the
    newest one of output_dir instead."""
    auto_resume: bool = True
    """Resume the newest checkpoint of output_dir that is not damaged, if there is one."""
    save_ckpt: bool = True
    """Save checkpoints."""
    save_ckpt_freq: Positive = 1
    """Epochs from one checkpoint to the next."""
    save_ckpt_num: Positive = 3
    """Numbered checkpoints kept, beside those of epochs 50, 100, 150, ..."""
    save_ckpt_steps: NonNegative = 0
    """Optimizer steps from one checkpoint inside an epoch to the next; 0 for none."""
    save_ckpt_minutes: NonNegativeFloat = 0.0
    """Minutes from one checkpoint inside an epoch to the next; 0 for none."""


@dataclass(frozen=True)
class FaultConfig:
    """Faults"""

    max_bad_steps: Positive = 20
    """Non-finite steps in a row, which are skipped, that end the run at its next log line."""
    max_bad_images: NonNegative = 100
    """Images that cannot be read, each of which is replaced by another of its class in training,
    left out in evaluation, and listed in bad_images.txt; with more of them the run ends."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    eval: bool = False
    """Evaluate the checkpoint given by resume, and exit."""
    dist_eval: bool = True
    """Share the evaluation among the processes; each image counts once in either case."""
    disable_eval: bool = False
    """Train without evaluating."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_dir: str | None = None
    """Folder of the TensorBoard events; none are written if not given."""
    log_interval: Positive = 10
    """Optimizer steps from one log line to the next."""
    enable_wandb: bool = False
    """Send the run to Weights & Biases; needs the package wandb."""
    project: str = "hornet"
    """Its project there."""
    exp_name: str = "default"
    """Its name there."""
    wandb_ckpt: bool = False
    """Upload the checkpoints of output_dir there at the end."""


@dataclass(frozen=True)
class ComputeConfig:
    """Computation"""

    use_amp: bool = False
    """Mixed precision: convolutions and matrix products in amp_dtype."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Data type of mixed precision; float16 scales the loss, and skips steps that overflow."""
    channels_last: bool = True
    """Lay weights out channels last in memory, the layout in which HorNets compute."""
    compile: bool = False
    """Compile the network by torch.compile; the first step of each shape takes long."""
    triton: bool = False
    """Use this project's GPU kernels: depthwise convolutions, global filters, and in evaluation the
    first and last products of a gnConv (HorNet models); `python -m benchmarks` compares their
    speed. PyTorch's operators run where Triton or a shape does not allow them."""
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
    """Seed of every random number."""
    smoke: bool = False
    """Shrink the run to seconds, to see that it works: two epochs of 256 images, a tiny HorNet, no
    start weights; on digits where data_path is not given, and into OUTPUT_DIR-smoke."""


@dataclass(frozen=True)
class ProcessConfig:
    """Processes"""

    local_rank: int = -1
    """Set by torch.distributed.launch; LOCAL_RANK in the environment overrides it."""
    world_size: int = 1
    """Processes of a run that srun starts, with ranks from SLURM_PROCID; torchrun sets its own."""
    dist_url: str = "env://"
    """Where processes meet: env:// (MASTER_ADDR and MASTER_PORT), tcp://HOST:PORT or file://PATH."""
    dist_timeout: Annotated[float, Range(0.01)] = 30.0
    """Minutes that a process waits for the others before it ends the run."""
    dist_on_itp: bool = False
    """Ranks from Open MPI (OMPI_COMM_WORLD_RANK, _SIZE and _LOCAL_RANK)."""


@dataclass(frozen=True)
class Config:
    """All sections. The command line and a recipe name the fields, never the sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
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
        """Images of one optimizer step."""
        return self.data.batch_size * self.optim.update_freq * processes

    def wandb_options(self) -> dict[str, Any] | None:
        """Arguments of wandb.init, or None without --enable_wandb."""
        if not self.logging.enable_wandb:
            return None
        return {
            "project": self.logging.project,
            "name": self.logging.exp_name,
            "config": self.flat(),
            "dir": self.checkpoint.output_dir or None,
        }

    def flat(self) -> dict[str, Any]:
        """Every flag with its value, as plain values that YAML and a checkpoint can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for section in asdict(self).values()
            for name, value in section.items()
        }

    def save(self, path: str | Path) -> None:
        """Writes the flags as a recipe, which `--config` reads back."""
        Path(path).write_text(yaml.safe_dump(self.flat(), sort_keys=False))


SECTIONS: dict[str, type] = {f.name: f.type for f in fields(Config)}  # type: ignore[misc]
