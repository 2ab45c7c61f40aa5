"""Batch norm over the batches of all processes, on CPUs, too (torch's needs GPUs)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.errors import UserError


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d to 3d with the mean and variance of equally large batches of all processes."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - of the base class
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world_size = dist.get_world_size()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        axes = [0, *range(2, x.ndim)]
        values = x.float()
        mean = all_reduce(values.mean(axes)) / world_size
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().mean(axes)) / world_size
        if self.track_running_stats:
            running: Any = self
            count = world_size * x.numel() // x.shape[1]
            with torch.no_grad():
                running.num_batches_tracked += 1
                running.running_mean.lerp_(mean, self.momentum)
                running.running_var.lerp_(variance * count / (count - 1), self.momentum)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def synchronise_batch_norms(model: nn.Module) -> None:
    """Replace batch norms by the class above, in place; UserError for other kinds of them.

    A single process needs no replacement.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SyncBatchNorm
        elif isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            raise UserError(
                f"--sync_bn true: {type(module).__name__} cannot be synchronised, give false"
            )
