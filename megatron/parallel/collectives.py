"""Collectives over one axis of the mesh, without and with gradients. On an axis of one rank each does nothing.

"Tokens" are the first dimension of a tensor; where they are split, rank r of s holds the r-th of s equal slices. A
tensor is "whole" if every rank holds all of it, and "partial" if the true values are the sum over the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.mesh import Axis
from megatron.parallel.waits import Waits

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor, axis: Axis) -> Tensor:
    """`tensor`, replaced in place by its sum over the axis. Not differentiable."""
    return start_all_reduce(tensor, axis).wait()


def all_reduce_max(tensor: Tensor, axis: Axis) -> Tensor:
    """`tensor`, replaced in place by its elementwise maximum over the axis. Not differentiable."""
    if axis.size == 1:
        return tensor
    return Pending(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=axis.group, async_op=True),
                   axis.waits).wait()


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """The ranks' equally shaped tensors, concatenated along the first dimension. Not differentiable."""
    return start_all_gather(tensor, axis).wait()


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's slice along the first dimension of the sum over the axis. Not differentiable."""
    return start_reduce_scatter(tensor, axis).wait()


def all_gather_object(value: T, axis: Axis) -> list[T]:
    """A list of every rank's value, in rank order, on every rank; for small Python objects."""
    if axis.size == 1:
        return [value]
    values = [value] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def gather_object(value: T, axis: Axis) -> list[T]:
    """A list of every rank's value, in rank order, on the first rank; an empty list on the others."""
    if axis.size == 1:
        return [value]
    values = [value] * axis.size if axis.rank == 0 else []
    dist.gather_object(value, values or None, group=axis.group, group_dst=0)
    return values


def all_gather_in_turn(mine: list[T], axis: Axis) -> list[T]:
    """The results of a list of tasks that the ranks took in turn, in the order of the tasks, on every rank.

    `mine`: this rank's results, those of the tasks number rank, rank + size, rank + 2 size, ...
    """
    parts = all_gather_object(mine, axis)
    return [parts[number % axis.size][number // axis.size] for number in range(sum(map(len, parts)))]


@dataclass(frozen=True)
class Pending:
    """A collective, or a message, under way: whatever is computed before `wait` overlaps with it."""

    result: Tensor  # valid after `wait`
    work: dist.Work | None  # None: nothing to wait for
    waits: Waits | None = None  # counts the time spent in `wait`

    def wait(self) -> Tensor:
        """The result, as soon as it is there."""
        if self.work is not None and self.waits is None:
            self.work.wait()
        elif self.work is not None and self.waits is not None:
            self.waits.during(self.work.wait)
        return self.result

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.work is None or self.work.is_completed()


def start_all_reduce(tensor: Tensor, axis: Axis) -> Pending:
    """Begin `all_reduce_sum`; leave `tensor` alone until its `wait`."""
    work = dist.all_reduce(tensor, group=axis.group, async_op=True) if axis.size > 1 else None
    return Pending(tensor, work, axis.waits)


def start_all_gather(tensor: Tensor, axis: Axis) -> Pending:
    """Begin `all_gather`."""
    if axis.size == 1:
        return Pending(tensor, None)
    whole = tensor.new_empty(axis.size * tensor.shape[0], *tensor.shape[1:])
    # torch 2.13 has the first name and deprecates the second; 2.11 has only the second.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return Pending(whole, gather(whole, tensor.contiguous(), group=axis.group, async_op=True), axis.waits)


def start_reduce_scatter(tensor: Tensor, axis: Axis) -> Pending:
    """Begin `reduce_scatter`; the first dimension is divisible by the axis' size."""
    if axis.size == 1:
        return Pending(tensor, None)
    mine = tensor.new_empty(tensor.shape[0] // axis.size, *tensor.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return Pending(mine, scatter(mine, tensor.contiguous(), group=axis.group, async_op=True), axis.waits)


def start_exchange(tensor: Tensor, to_each: Sequence[int], from_each: Sequence[int], axis: Axis) -> Pending:
    """Begin an all-to-all: the next `to_each[r]` elements of `tensor` [sum(to_each)] go to rank r of the axis.

    The result [sum(from_each)] holds `from_each[r]` elements from each rank r, in rank order. Not differentiable.
    """
    if axis.size == 1:
        return Pending(tensor, None)
    received = tensor.new_empty(sum(from_each))
    return Pending(received, dist.all_to_all_single(received, tensor, list(from_each), list(to_each), group=axis.group,
                                                    async_op=True), axis.waits)


def slice_of(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's slice of a whole tensor along its first dimension. No communication."""
    return tensor.chunk(axis.size)[axis.rank] if axis.size > 1 and len(tensor) else tensor


def sum_gradients(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: the whole tensor, unchanged. Backward: the partial gradients are summed over the axis (all-reduce)."""
    return _SumGradients.apply(tensor, axis) if axis.size > 1 else tensor


def sum_outputs(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: the partial tensors are summed over the axis, in place (all-reduce). Backward: the whole gradient,
    unchanged."""
    return _SumOutputs.apply(tensor, axis) if axis.size > 1 else tensor


def sum_to_slices(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: this rank's tokens of the sum of the partial tensors (reduce-scatter). Backward: the gradients of all
    ranks' tokens (all-gather)."""
    return _SumToSlices.apply(tensor, axis) if axis.size > 1 else tensor


def gather_slices(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: the tokens of all ranks (all-gather). Backward: this rank's tokens of the sum of the partial gradients
    (reduce-scatter)."""
    return _GatherSlices.apply(tensor, axis) if axis.size > 1 else tensor


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(tensor)
        return all_reduce_sum(tensor, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(tensor, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.axis), None


class _GatherSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(tensor, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient, ctx.axis), None
