"""Sums over the ranks of an axis. On a one-rank axis each does nothing."""

import torch
import torch.distributed as dist

from megatron.parallel.mesh import Axis


def all_reduce_sum(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`tensor`, replaced in place by its sum over the axis. Not differentiable."""
    if axis.size > 1:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)
