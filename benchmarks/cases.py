"""What is measured: each function returns rows of a report."""

import copy
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import models
from benchmarks.measure import Timing, kept_bytes, paired, peak_bytes
from config import AugmentConfig, DataConfig, OptimConfig
from engine import clip_gradient
from input_pipeline.image_sets import open_folder
from input_pipeline.loaders import TrainImages
from input_pipeline.transforms import allow_zero_bits, mean_std, train_transform
from input_pipeline.unreadable import UnreadableImages
from optim_factory import create_optimizer
from runtime.errors import UserError, reason_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A line of the report: how many times as good as the peer, and what it should be."""

    case: str
    what: str
    ratio: float | None
    """None: not measured."""
    detail: str = ""
    target: float | None = None
    lower_is_better: bool = False

    @property
    def reached(self) -> bool:
        """Within five per cent of the target."""
        if self.target is None or self.ratio is None:
            return self.target is None
        return (
            self.ratio <= 1.05 * self.target
            if self.lower_is_better
            else self.ratio >= 0.95 * self.target
        )


@dataclass(frozen=True)
class Setting:
    """A model and its input, and how often it is timed."""

    model: str
    peer: Callable[..., nn.Module]
    batch: int
    size: int
    dtype: torch.dtype
    device: torch.device
    rounds: int
    targets: dict[str, float] = field(default_factory=dict)
    """By mode: what a row should reach."""

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.model} batch {self.batch} at {self.size}, {kind}"

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Our model and the peer's, of the same weights."""
        torch.manual_seed(0)
        try:
            theirs = self.peer()
        except Exception as error:
            raise UserError(f"--peer: its {self.model} cannot be built: {error!r}") from None
        ours = timm.create_model(self.model)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "gamma" in name:
                    parameter.fill_(0.5)  # at 1e-6 a block could be wrong unseen
        try:
            ours.load_state_dict(theirs.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"--peer: the weights of its {self.model} do not fit: {reason_of(error)}"
            ) from None
        layout = torch.channels_last
        ours = ours.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        return ours, theirs.to(self.device)

    def convnext(self) -> dict[str, nn.Module]:
        """timm's ConvNeXt of the same size, by its name; none if there is none."""
        name = f"convnext_{self.model.split('_')[1]}"
        if not timm.is_model(name):
            return {}
        layout = torch.channels_last
        model = timm.create_model(name).to(self.device, memory_format=layout)  # type: ignore[call-overload]
        return {name: model}

    def images(self) -> torch.Tensor:
        return torch.randn(self.batch, 3, self.size, self.size, device=self.device)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def row(self, what: str, mode: str, timings: dict[str, Timing]) -> Row:
        """The row of a contender, by its timing and that of the peer."""
        ratio, detail = speed(timings[what], timings["peer"])
        return Row(self.name, f"{mode}, {what}", ratio, detail, self.targets.get(what))

    def shares(self, megabytes: dict[str, float], whats: dict[str, str]) -> list[Row]:
        """Rows of the memory that contenders take, as shares of the peer's."""
        of_peer = megabytes["peer"]
        return [
            Row(self.name, what, megabytes[name] / of_peer,
                f"{megabytes[name]:.0f} MB, peer {of_peer:.0f} MB", self.targets.get(what), True)
            for name, what in whats.items()
        ]  # fmt: skip


def speed(own: Timing, peer: Timing) -> tuple[float, str]:
    """How many times as fast as the peer, and the figures behind it."""
    ratios = own.ratios_to(peer)
    lower, upper = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return median(ratios), (
        f"{1e3 * own.median:.1f} ms, peer {1e3 * peer.median:.1f} ms; "
        f"quartiles {lower:.2f} to {upper:.2f}, n = {len(ratios)}"
    )


def inference(setting: Setting, compiles: bool) -> list[Row]:
    """As built, folded by `reparameterize_model`, and compiled with frozen weights if asked for."""
    ours, theirs = (model.eval() for model in setting.pair())
    folded = models.accelerate(reparameterize_model(ours))
    contenders = {"peer": theirs, "as built": models.accelerate(ours), "folded": folded}
    if setting.device.type == "cuda":
        contenders["folded, triton"] = _with_triton(folded)
    convnext = {name: model.eval() for name, model in setting.convnext().items()}
    if compiles:
        # imported late: it takes seconds
        from torch._inductor import config as inductor

        inductor.freezing = True
        contenders["compiled"] = _compiled(folded)
        convnext |= {f"{name}, compiled": _compiled(model) for name, model in convnext.items()}
    images = setting.images()

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad(), setting.autocast():
            return model(images)

    expected = run(theirs).float()
    for name, model in contenders.items():
        error = (run(model).float() - expected).abs().max() / expected.abs().max()
        if error > (1e-5 if setting.dtype == torch.float32 else 3e-2):
            raise AssertionError(f"{setting.name}, {name}: another result, error {error:.1e}")
    runs = {name: partial(run, model) for name, model in (contenders | convnext).items()}
    timings = paired(runs, setting.rounds, setting.device)
    return [setting.row(name, "inference", timings) for name in runs if name != "peer"]


def training(setting: Setting, compiles: bool) -> list[Row]:
    """Forward and backward pass, and the memory they take."""
    ours, theirs = (model.train() for model in setting.pair())
    images = setting.images()

    def loss(model: nn.Module) -> torch.Tensor:
        with setting.autocast():
            logits = model(images)
        return logits.float().logsumexp(1).mean()

    def step(model: nn.Module) -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    lean = models.accelerate(copy.deepcopy(ours), memory="lean")
    models.accelerate(ours)
    contenders = {"peer": theirs, "training": ours, "lean": lean}
    if setting.device.type == "cuda":
        contenders["triton"] = _with_triton(ours)
    convnext = {name: model.train() for name, model in setting.convnext().items()}
    if compiles and setting.device.type == "cuda":  # on CPUs it gains nothing, and takes minutes
        contenders["training, compiled"] = _compiled(ours)
        convnext |= {f"{name}, compiled": _compiled(model) for name, model in convnext.items()}
    runs = {name: partial(step, model) for name, model in (contenders | convnext).items()}
    timings = paired(runs, setting.rounds, setting.device)
    rows = [setting.row(name, "forward and backward", timings) for name in runs if name != "peer"]
    kept = {
        name: kept_bytes(partial(loss, contenders[name]), setting.device) / 1e6
        for name in ("peer", "training", "lean")
    }
    peaks = {name: peak_bytes(run, setting.device) / 1e6 for name, run in runs.items()}
    saved = {"training": "saved for backward", "lean": "saved for backward, lean"}
    rows += setting.shares(kept, saved)
    rows += setting.shares(peaks, {n: f"peak memory, {n}" for n in runs if n != "peer"})
    return rows


def _compiled(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.compile()
    return copied


def _with_triton(model: nn.Module) -> nn.Module:
    return models.accelerate(copy.deepcopy(model), triton=True)


def loop(model_name: str, rounds: int, device: torch.device, target: float | None) -> list[Row]:
    """Moving average, clipping and AdamW, against a Python loop and the defaults of PyTorch."""
    model = timm.create_model(model_name).to(device)
    average = ModelEmaV3(model, decay=0.9999)
    fast = create_optimizer(OptimConfig(), model, 1e-3)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def ours() -> None:
        clip_gradient(parameters, 5.0)
        fast.step()
        average.update(model)

    @torch.no_grad()
    def theirs() -> None:
        nn.utils.clip_grad_norm_(parameters, 5.0)
        plain.step()
        for kept, weight in zip(average.module.parameters(), parameters, strict=True):
            kept.copy_(0.9999 * kept + (1 - 0.9999) * weight)

    timings = paired({"peer": theirs, "ours": ours}, rounds, device)
    share = median(1 / ratio for ratio in timings["ours"].ratios_to(timings["peer"]))
    detail = f"{1e3 * timings['ours'].median:.0f} ms, peer {1e3 * timings['peer'].median:.0f} ms"
    detail += f", n = {rounds}"
    return [
        Row(model_name, "EMA, clipping and AdamW: share of the time", share, detail, target, True)
    ]


def loader(rounds: int, targets: dict[str, float]) -> list[Row]:
    """Images a second and core, against timm's training transform of the same policy."""
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder) / "a", 32)
        config = AugmentConfig()
        transform = create_transform(
            224, is_training=True, auto_augment=config.aa, interpolation="bicubic",
            re_prob=config.reprob, re_mode=config.remode, re_count=config.recount,
            color_jitter=config.color_jitter,
        )  # fmt: skip
        allow_zero_bits(transform)  # which the policy needs with today's Pillow
        contenders: dict[str, Dataset] = {"peer": ImageFolder(folder, transform)}
        missing = ""
        for name, fast in (("same pixels", False), ("--fast_decode", True)):
            try:
                augment = replace(config, fast_decode=fast)
                view = train_transform(augment, 224, *mean_std(DataConfig()))
            except UserError as error:  # its packages are not installed
                missing = str(error)
                continue
            unreadable = UnreadableImages(Path(folder) / "bad_images.txt", 0)
            contenders[name] = TrainImages(open_folder(Path(folder), view), 0, unreadable)

        def load(images: Dataset) -> None:
            for index in range(32):
                images[index]

        runs = {name: partial(load, images) for name, images in contenders.items()}
        timings = paired(runs, rounds, torch.device("cpu"))
    rows = []
    case = "500 x 375 JPEG to 224, RandAugment"
    for name in targets:
        if name not in timings:
            rows.append(Row(case, f"loader, {name}", None, missing, targets[name]))
            continue
        rates = [32 / timings[contender].median for contender in (name, "peer")]
        detail = f"{rates[0]:.0f} images/s a core, peer {rates[1]:.0f}, n = {rounds}"
        ratio = median(timings[name].ratios_to(timings["peer"]))
        rows.append(Row(case, f"loader, {name}", ratio, detail, targets[name]))
    return rows


def write_photos(folder: Path, count: int) -> None:
    """JPEG files of 500 x 375 pixels: smooth colours with noise, about as large as photographs."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for index in range(count):
        coarse = Image.fromarray(random.randint(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + random.randint(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(noisy).save(data, "JPEG", quality=90)
        (folder / f"{index}.jpg").write_bytes(data.getvalue())


def start(rounds: int, target: float | None) -> list[Row]:
    """Seconds until `main.py --help` has answered."""
    seconds = []
    for _ in range(rounds + 1):
        since = time.perf_counter()
        subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, stdout=-3, check=True)
        seconds.append(time.perf_counter() - since)
    detail = f"n = {rounds}"
    return [Row("main.py --help", "seconds", median(seconds[1:]), detail, target, True)]


def matrix_rates(device: torch.device, rounds: int) -> dict[str, Any]:
    """GFLOP/s of the matrix product that a HorNet-T has most of, in each way it is computed."""
    rows, width, wide = 8 * 14 * 14, 256, 1024
    ways: dict[str, Callable[..., Any]] = {"F.linear": nn.functional.linear}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, width, device=device, dtype=dtype)
        weight = torch.randn(wide, width, device=device, dtype=dtype)
        runs = {name: partial(way, x, weight) for name, way in ways.items()}
        with torch.no_grad():
            timings = paired(runs, 5 * rounds, device, warm_up=3)
        for name, timing in timings.items():
            rate = 2 * rows * width * wide / min(timing.seconds) / 1e9
            rates[f"{name}, {str(dtype).removeprefix('torch.')}"] = f"{rate:.0f} GFLOP/s"
    return rates
