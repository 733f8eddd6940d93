"""Activation recomputation: activations are computed again in the backward pass (Chen et al., 2016, arXiv 1604.06174).
"""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron.parallel.collectives import all_gather
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis

T = TypeVar("T")


def recomputed(function: Callable[..., T], *inputs: Tensor, kept_over: Axis = ONE_RANK_AXIS) -> T:
    """`function(*inputs)`, for whose backward pass only the inputs are kept.

    A single input that all ranks of `kept_over` hold alike is split over them meanwhile. Forward: no communication of
    its own. Backward: that input is gathered, and `function`, with its collectives, runs again; it must give the same
    result, so it draws from no random generator.
    """
    if kept_over.size == 1:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    [x] = inputs
    shape, has_gradient, at_hand = x.shape, x.requires_grad, [x]

    def from_share(share: Tensor) -> T:
        return function(at_hand.pop() if at_hand else _gathered(share, shape, kept_over).requires_grad_(has_gradient))

    return checkpoint(from_share, _share(x, kept_over), use_reentrant=False, preserve_rng_state=False)


def _share(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the elements of `x`, flat and padded to the same number on every rank."""
    flat = x.detach().flatten()
    size = -(-flat.numel() // axis.size)
    mine = flat[axis.rank * size:(axis.rank + 1) * size]
    return F.pad(mine, (0, size - mine.numel())).clone()


def _gathered(share: Tensor, shape: tuple[int, ...], axis: Axis) -> Tensor:
    return all_gather(share, axis)[:math.prod(shape)].view(shape)
