"""Inference and training of a model and its peer."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import models
from benchmarks.measure import Row, Timing, kept_bytes, paired, peak_bytes, speed
from runtime.errors import UserError, reason_of
from utils import activations_of, count_parameters, gmacs_of


@dataclass(frozen=True)
class Setting:
    """A model, its peer, their input, and the number of timed runs."""

    model: str
    peer: Callable[[], nn.Module]
    batch: int
    size: int
    dtype: str
    device: torch.device
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.model} batch {self.batch} at {self.size}, {self.dtype}"

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Return our plain model and the peer's, with the same weights."""
        torch.manual_seed(0)
        try:
            theirs = self.peer()
        except Exception as error:
            raise UserError(f"--peer: its {self.model} cannot be built: {error!r}") from None
        ours = timm.create_model(self.model)
        for name, parameter in theirs.named_parameters():
            if "gamma" in name:
                nn.init.constant_(parameter, 0.5)  # at 1e-6 an error in a block would not show
        try:
            ours.load_state_dict(theirs.state_dict())
        except RuntimeError as error:
            reason = f"the weights of its {self.model} do not fit: {reason_of(error)}"
            raise UserError(f"--peer: {reason}") from None
        return self._channels_last(ours), theirs.to(self.device)

    def convnext(self, compiles: bool) -> dict[str, nn.Module]:
        """Return timm's ConvNeXt of the same size, if there is one, also compiled if asked for."""
        name = f"convnext_{self.model.split('_')[1]}"
        if not timm.is_model(name):
            return {}
        model = self._channels_last(timm.create_model(name))
        return {name: model} | ({f"{name}, compiled": _compiled(model)} if compiles else {})

    def _channels_last(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self) -> torch.Tensor:
        return torch.randn(self.batch, 3, self.size, self.size, device=self.device)

    def autocast(self) -> AbstractContextManager:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def speed_rows(self, mode: str, timings: dict[str, Timing]) -> list[Row]:
        """Return a row for each contender but the peer."""
        peer = timings.pop("peer")
        return [
            Row(self.name, f"{mode}, {n}", *speed(t, peer), t.median) for n, t in timings.items()
        ]

    def result(self, seconds: float) -> dict[str, str]:
        """Return the speed of inference and the size of the model in the columns of timm."""
        with torch.device("meta"):
            model, image = timm.create_model(self.model), torch.empty(1, 3, self.size, self.size)
        return {
            "model": self.model,
            "infer_img_size": str(self.size),
            "infer_samples_per_sec": f"{self.batch / seconds:.2f}",
            "infer_step_time": f"{1e3 * seconds:.3f}",
            "infer_batch_size": str(self.batch),
            "param_count": f"{count_parameters(model) / 1e6:.2f}",
            "infer_gmacs": f"{sum(gmacs_of(model, image)['']):.2f}",
            "infer_macts": f"{activations_of(model, image) / 1e6:.2f}",
        }

    def memory_row(self, what: str, own: float, peer: float) -> Row:
        """Return a row with a share of the peer's memory, both in bytes."""
        return Row(self.name, what, own / peer, f"{own / 1e6:.0f} MB, peer {peer / 1e6:.0f} MB")


def inference(setting: Setting, compiles: bool) -> list[Row]:
    """Measure the model as built, folded by `reparameterize_model`, and compiled if asked for.

    Raises AssertionError if a contender's logits differ from the peer's.
    """
    ours, theirs = (model.eval() for model in setting.pair())
    folded = models.accelerate(reparameterize_model(ours))
    contenders = {"peer": theirs, "as built": models.accelerate(ours), "folded": folded}
    if setting.device.type == "cuda":
        contenders["folded, triton"] = models.accelerate(copy.deepcopy(folded), triton=True)
    if compiles:
        # imported late: it takes seconds
        from torch._inductor import config as inductor

        inductor.freezing = True
        contenders["compiled"] = _compiled(folded)
    convnext = {name: model.eval() for name, model in setting.convnext(compiles).items()}
    images = setting.images()

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad(), setting.autocast():
            return model(images)

    expected = run(theirs).float()
    for name, model in contenders.items():
        error = (run(model).float() - expected).abs().max() / expected.abs().max()
        if error > (1e-5 if setting.dtype == "float32" else 3e-2):
            raise AssertionError(f"{setting.name}, {name}: another result, error {error:.1e}")
    runs = {name: partial(run, model) for name, model in (contenders | convnext).items()}
    return setting.speed_rows("inference", paired(runs, setting.rounds, setting.device))


def training(setting: Setting, compiles: bool) -> list[Row]:
    """Measure forward and backward pass, and their memory."""
    ours, theirs = (model.train() for model in setting.pair())
    images, on_gpu = setting.images(), setting.device.type == "cuda"
    compiles = compiles and on_gpu  # on CPUs it gains nothing, and takes minutes

    def loss(model: nn.Module) -> torch.Tensor:
        with setting.autocast():
            logits = model(images)
        return logits.float().logsumexp(1).mean()

    def step(model: nn.Module) -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    lean = models.accelerate(copy.deepcopy(ours), memory="lean")
    contenders = {"peer": theirs, "training": models.accelerate(ours), "lean": lean}
    if on_gpu:
        contenders["triton"] = models.accelerate(copy.deepcopy(ours), triton=True)
    if compiles:
        contenders["training, compiled"] = _compiled(ours)
    convnext = {name: model.train() for name, model in setting.convnext(compiles).items()}
    runs = {name: partial(step, model) for name, model in (contenders | convnext).items()}
    rows = setting.speed_rows("forward and backward", paired(runs, setting.rounds, setting.device))
    kept = [kept_bytes(partial(loss, model), setting.device) for model in (theirs, ours, lean)]
    peaks = {name: peak_bytes(run, setting.device) for name, run in runs.items()}
    rows.append(setting.memory_row("saved for backward", kept[1], kept[0]))
    rows.append(setting.memory_row("saved for backward, lean", kept[2], kept[0]))
    peer = peaks.pop("peer")
    return rows + [setting.memory_row(f"peak memory, {n}", own, peer) for n, own in peaks.items()]


def _compiled(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.compile()
    return copied


def matrix_rates(device: torch.device, rounds: int) -> dict[str, Any]:
    """Return GFLOP/s of the most frequent matrix product of HorNet-T, by each library."""
    rows, width, wide = 8 * 14 * 14, 256, 1024
    ways: dict[str, Callable[..., Any]] = {"F.linear": nn.functional.linear}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    rates = {}
    for dtype in ("float32", "bfloat16"):
        x = torch.randn(rows, width, device=device, dtype=getattr(torch, dtype))
        weight = torch.randn(wide, width, device=device, dtype=getattr(torch, dtype))
        runs = {name: partial(way, x, weight) for name, way in ways.items()}
        for name, run in list(runs.items()):
            try:
                run()
            except RuntimeError:  # the processor has no instructions for this dtype
                rates[f"{name}, {dtype}"] = "cannot run"
                del runs[name]
        with torch.no_grad():
            timings = paired(runs, 5 * rounds, device, warm_up=3)
        for name, timing in timings.items():
            rate = 2 * rows * width * wide / min(timing.seconds) / 1e9
            rates[f"{name}, {dtype}"] = f"{rate:.0f} GFLOP/s"
    return rates
