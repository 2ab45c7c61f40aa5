"""Running sums of training metrics, on the device between log lines."""

import math

import torch

from runtime.distributed import all_reduce_sum


class Meters:
    """Sums of this rank since the start of the epoch and since the last log line.

    Each tensor holds: loss x images, correct predictions, images, gradient norms, steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.epoch = torch.zeros(5, dtype=torch.float64, device=device)
        self.line = torch.zeros_like(self.epoch)

    def end_line(self) -> dict[str, float]:
        """Return the means since the last line (NaN without a finite step) and start a new line."""
        means = self.means(self.line)
        self.epoch += self.line
        self.line.zero_()
        return means

    def of_epoch(self) -> dict[str, float]:
        """Return the means of all ranks since the start of the epoch."""
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

    def load(self, saved: torch.Tensor, rank: int, world_size: int) -> None:
        """Restore the sums of all ranks, (world size then, 2, 5).

        With the same world size each rank gets its own sums back; otherwise rank 0 gets the total.
        """
        if len(saved) != world_size:
            total, ranks_then = saved.sum(0), len(saved)
            saved = torch.zeros(world_size, *total.shape, dtype=total.dtype)
            saved[0] = total
            saved[0, :, 3:] *= world_size / ranks_then  # each rank counts all norms and steps
        self.epoch.copy_(saved[rank, 0])
        self.line.copy_(saved[rank, 1])
