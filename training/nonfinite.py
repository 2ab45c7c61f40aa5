"""Non-finite steps: all ranks skip them, since the gradient has NaN or inf on some rank.

They are counted on the device and logged at each log line. Too many in a row end the run with a
report of the last one (bad_step.json): its gradient norms and its images.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from runtime.errors import UserError

logger = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """Too many steps in a row were non-finite; `report` describes the last one."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class NonFiniteSteps:
    """Non-finite steps: the current number in a row, the largest, the total; and the last step."""

    def __init__(self, device: torch.device, most_in_a_row: int) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.most_in_a_row = most_in_a_row
        self.norms = torch.zeros(0, device=device)  # the last one's gradient norm per parameter
        self.parameters: list[nn.Parameter] = []
        self.logged = 0

    @property
    def in_a_row(self) -> int:
        """The current number in a row; waits for the device."""
        return int(self.counts[0])

    def record(
        self, finite: torch.Tensor, parameters: list[nn.Parameter], norms: torch.Tensor, step: int
    ) -> None:
        """Count a step if it isn't `finite`, and keep its gradient norms."""
        bad = (~finite).long()
        in_a_row = (self.counts[0] + 1) * bad
        last = torch.where(finite, self.counts[3], step)
        most, total = self.counts[1].maximum(in_a_row), self.counts[2] + bad
        self.counts = torch.stack((in_a_row, most, total, last))
        if not self.parameters:
            self.parameters, self.norms = parameters, torch.zeros_like(norms)
        self.norms = torch.where(finite, self.norms, norms)

    def check(self, model: nn.Module, learning_rate: Callable[[int], float]) -> None:
        """Log new ones; raise NonFiniteError if there were too many in a row.

        `learning_rate` gives that of a step.
        """
        _, most, total, last = self.counts.tolist()
        if total > self.logged:
            self.logged = total
            logger.warning("%d non-finite steps skipped so far, the last: step %d", total, last)
        if most < self.most_in_a_row:
            return
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        norms = [x if math.isfinite(x) else str(x) for x in self.norms.tolist()]
        by_name = zip((names[id(p)] for p in self.parameters), norms, strict=True)
        report = {"step": last, "learning_rate": learning_rate(last)}
        raise NonFiniteError(
            f"the gradient was not finite in {most} steps in a row, the last of them step {last}: "
            "--resume a checkpoint from before them, with a lower --lr or --clip_grad",
            report | {"gradient_norms": dict(by_name)},
        )

    def load(self, saved: Any) -> None:
        """Restore the counts of a checkpoint, if it has them."""
        if torch.is_tensor(saved) and saved.shape == self.counts.shape:
            self.counts.copy_(saved)
            self.counts[1] = 0  # a resumed run may have other flags, so it counts from here
            self.logged = int(saved[2])
