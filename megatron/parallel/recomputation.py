"""Activations that are not kept but computed again in the backward pass (Chen et al., 2016, arXiv 1604.06174)."""

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
    """`function(*inputs)`, of which only the inputs are kept; one alone may be shared out over the ranks of
    `kept_over`, which all have it.

    Forward: no communication of its own. Backward: the input is gathered and `function`, with its collectives, runs
    again, which must do the same: it draws nothing from a generator.
    """
    if kept_over.size == 1:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    [x] = inputs
    shape, has_gradient, at_hand = x.shape, x.requires_grad, [x]

    def from_share(share: Tensor) -> T:
        return function(at_hand.pop() if at_hand else _gathered(share, shape, kept_over).requires_grad_(has_gradient))

    return checkpoint(from_share, _share(x, kept_over), use_reentrant=False, preserve_rng_state=False)


def _share(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the elements of `x`, as many on each rank."""
    flat = x.detach().flatten()
    size = -(-flat.numel() // axis.size)
    mine = flat[axis.rank * size:(axis.rank + 1) * size]
    return F.pad(mine, (0, size - mine.numel())).clone()


def _gathered(share: Tensor, shape: tuple[int, ...], axis: Axis) -> Tensor:
    return all_gather(share, axis)[:math.prod(shape)].view(shape)
