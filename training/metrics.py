"""Running sums of a training, which stay on the device from one log line to the next."""

import math

import torch

from runtime.distributed import all_reduce_sum


class Meters:
    """Sums of this rank: since the epoch began, and since a log line.

    Each is loss x images, right answers, images, gradient norms, and steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.epoch = torch.zeros(5, dtype=torch.float64, device=device)
        self.line = torch.zeros_like(self.epoch)

    def end_line(self) -> dict[str, float]:
        """The means since the last line, NaN of non-finite steps alone; the next line begins."""
        means = self.means(self.line)
        self.epoch += self.line
        self.line.zero_()
        return means

    def of_epoch(self) -> dict[str, float]:
        """The means of all ranks since the epoch began."""
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
        """Restores the sums of all ranks, (world size then, 2, 5).

        With the same world size each rank gets its own sums back; otherwise rank 0 gets the total.
        """
        if len(saved) != world_size:
            total, ranks_then = saved.sum(0), len(saved)
            saved = torch.zeros(world_size, *total.shape, dtype=total.dtype)
            saved[0] = total
            saved[0, :, 3:] *= world_size / ranks_then  # each rank counts all norms and steps
        self.epoch.copy_(saved[rank, 0])
        self.line.copy_(saved[rank, 1])
