"""Non-finite steps: their gradient has NaN or inf on some rank, so all ranks skip them.

They are counted on the device. At each log line their number is logged, and too many in a row end
the run with a report (bad_step.json) of the last one: its gradient norms and its images.
"""

import logging
import math
from typing import Any

import torch
from torch import nn

from optim_factory import Schedule
from runtime.errors import UserError

logger = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """Too many steps in a row were non-finite; `report` describes the last one."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class NonFiniteSteps:
    """Counts non-finite steps: in a row now, most in a row, in all; and the last one's number."""

    def __init__(self, device: torch.device, most_in_a_row: int) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.most_in_a_row = most_in_a_row
        """How many in a row end the run."""
        self.norms = torch.zeros(0, device=device)
        """The norms of the last one's gradient, one per parameter."""
        self.parameters: list[nn.Parameter] = []
        self.logged = 0

    @property
    def in_a_row(self) -> int:
        """How many there are in a row now; waits for the device."""
        return int(self.counts[0])

    def record(
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

    def check(self, model: nn.Module, schedule: Schedule) -> None:
        """Logs new ones; raises NonFiniteError where there were too many in a row."""
        _, most, total, last = self.counts.tolist()
        if total > self.logged:
            self.logged = total
            logger.warning("%d non-finite steps were skipped so far, the last: step %d",
                           total, last)  # fmt: skip
        if most < self.most_in_a_row:
            return
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        norms = [x if math.isfinite(x) else str(x) for x in self.norms.tolist()]
        by_name = zip((names[id(p)] for p in self.parameters), norms, strict=True)
        report = {"step": last, "learning_rate": schedule.learning_rate(last)}
        raise NonFiniteError(
            f"the gradient was not finite in {most} steps in a row, the last of them step {last}: "
            "--resume a checkpoint from before them, with a lower --lr or --clip_grad",
            report | {"gradient_norms": dict(by_name)},
        )

    def load(self, saved: Any) -> None:
        """Restores the counts of a checkpoint; of other files' none."""
        if torch.is_tensor(saved) and saved.shape == self.counts.shape:
            self.counts.copy_(saved)
            self.counts[1] = 0  # with other flags the run may go on after all
            self.logged = int(saved[2])
