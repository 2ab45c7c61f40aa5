"""Interleaved timing, so that a busy machine slows all contenders; memory; the machine."""

import gc
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one value per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios_to(self, peer: "Timing") -> list[float]:
        """Return how many times as fast as `peer` it is, per round, in ascending order."""
        return sorted(p / own for own, p in zip(self.seconds, peer.seconds, strict=True))


@dataclass(frozen=True)
class Row:
    """A row of the report."""

    case: str
    what: str
    ratio: float | None
    """How many times as good as the peer; None if not measured."""
    detail: str = ""
    seconds: float | None = None

    def __str__(self) -> str:
        ratio = "not measured" if self.ratio is None else f"{self.ratio:.2f}"
        return f"| {self.case} | {self.what} | {ratio} | {self.detail} |"


def speed(own: Timing, peer: Timing) -> tuple[float, str]:
    """Return how many times as fast as the peer it is, and the details."""
    ratios = own.ratios_to(peer)
    lower, upper = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return statistics.median(ratios), (
        f"{1e3 * own.median:.1f} ms, peer {1e3 * peer.median:.1f} ms; "
        f"quartiles {lower:.2f} to {upper:.2f}, n = {len(ratios)}"
    )


def paired(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, Timing]:
    """Run each contender once per round, in turn, after `warm_up` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    synchronize = torch.get_device_module(device).synchronize
    for number in range(warm_up + rounds):
        for name, run in contenders.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def kept_bytes(forward: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        return torch.cuda.memory_allocated(device) - before - result.nbytes
    sizes, result = _allocations(forward)
    return sum(sizes) - result.nbytes


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of the memory allocated by `run`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    sizes, _ = _allocations(run)
    return max(accumulate(sizes, initial=0))


def _allocations(run: Callable[[], Any]) -> tuple[list[int], Any]:
    """Return the bytes of each allocation on the CPU, negative when freed, and the result."""
    gc.collect()  # garbage would be freed in between
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"], result


def machine(device: torch.device) -> dict[str, str]:
    """Return the hardware and versions, for the head of a report."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    cpu, known = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if known.is_file():
        facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", known.read_text(), re.MULTILINE))
        cpu = f"{facts.get('model name', cpu)}, family {facts.get('cpu family', '?')}"
    return {
        "CPU": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }
