"""Inference and training of a network against the peer: each function returns rows of a report."""

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

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.model} batch {self.batch} at {self.size}, {kind}"

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Our plain model and the peer's, of the same weights."""
        torch.manual_seed(0)
        try:
            theirs = self.peer()
        except Exception as error:
            raise UserError(f"--peer: its {self.model} cannot be built: {error!r}") from None
        ours = timm.create_model(self.model)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "gamma" in name:
                    parameter.fill_(0.5)  # at 1e-6 an error in a block would not show
        try:
            ours.load_state_dict(theirs.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"--peer: the weights of its {self.model} do not fit: {reason_of(error)}"
            ) from None
        return self._laid_out(ours), theirs.to(self.device)

    def convnext(self) -> dict[str, nn.Module]:
        """timm's ConvNeXt of the same size, by its name; none if there is none."""
        name = f"convnext_{self.model.split('_')[1]}"
        return {name: self._laid_out(timm.create_model(name))} if timm.is_model(name) else {}

    def _laid_out(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self) -> torch.Tensor:
        return torch.randn(self.batch, 3, self.size, self.size, device=self.device)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def row(self, what: str, mode: str, timings: dict[str, Timing]) -> Row:
        """The row of a contender, by its timing and that of the peer."""
        return Row(self.name, f"{mode}, {what}", *speed(timings[what], timings["peer"]))

    def memory_rows(self, megabytes: dict[str, float], whats: dict[str, str]) -> list[Row]:
        """Rows of the memory that contenders take, as shares of the peer's."""
        of_peer = megabytes["peer"]
        return [
            Row(self.name, what, megabytes[name] / of_peer,
                f"{megabytes[name]:.0f} MB, peer {of_peer:.0f} MB")
            for name, what in whats.items()
        ]  # fmt: skip


def inference(setting: Setting, compiles: bool) -> list[Row]:
    """As built, folded by `reparameterize_model`, and compiled with frozen weights if asked for."""
    ours, theirs = (model.eval() for model in setting.pair())
    folded = models.accelerate(reparameterize_model(ours))
    contenders = {"peer": theirs, "as built": models.accelerate(ours), "folded": folded}
    if setting.device.type == "cuda":
        contenders["folded, triton"] = models.accelerate(copy.deepcopy(folded), triton=True)
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
    contenders = {"peer": theirs, "training": models.accelerate(ours), "lean": lean}
    if setting.device.type == "cuda":
        contenders["triton"] = models.accelerate(copy.deepcopy(ours), triton=True)
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
    rows += setting.memory_rows(kept, saved)
    rows += setting.memory_rows(peaks, {n: f"peak memory, {n}" for n in runs if n != "peer"})
    return rows


def _compiled(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.compile()
    return copied


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
