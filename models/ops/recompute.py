"""Less memory in training: what is cheap to compute again is not kept for the backward pass.

Of a block are kept its input, the outputs of its depthwise convolution, and those of matrix
products that are wider than the block (proj_in and the first layer of the MLP). Norms, activations,
multiplications and narrow products run a second time. The gradient is the same to the last bit
wherever operations repeat themselves.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .pointwise import ONEDNN_MATMUL

aten = torch.ops.aten


def lean(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), whose backward pass recomputes what `_is_kept` does not name."""
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, x.shape[1]))
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _policy(channels: int, _: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    keep = _is_kept(operation, arguments, channels)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operation: Any, arguments: tuple[Any, ...], channels: int) -> bool:
    products = [aten.convolution.default]
    if ONEDNN_MATMUL is not None:
        products.append(ONEDNN_MATMUL.default)
    if operation not in products:
        return False
    outputs, inputs = arguments[1].shape[:2]
    return inputs == 1 or outputs > channels
