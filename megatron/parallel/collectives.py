"""What passes between the ranks of an axis: sums, gathers, and the same with gradients. On one rank each does nothing.

"Tokens" is the first dimension of a tensor; rank r of s holds the r-th of s equal slices of them. A tensor is "whole"
where every rank holds all of it, and "partial" where the true values are the sum over the ranks.
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
    """`tensor`, replaced in place by the largest values over the axis. Not differentiable."""
    if axis.size == 1:
        return tensor
    return Pending(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=axis.group, async_op=True),
                   axis.waits).wait()


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """The ranks' equally shaped tensors, one behind the other along the first dimension. Not differentiable."""
    return start_all_gather(tensor, axis).wait()


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's slice, along the first dimension, of the sum over the axis. Not differentiable."""
    return start_reduce_scatter(tensor, axis).wait()


def everyones(value: T, axis: Axis) -> list[T]:
    """Each rank's value, in their order, on every rank; small things, as Python objects."""
    if axis.size == 1:
        return [value]
    values = [value] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def everyones_on_first(value: T, axis: Axis) -> list[T]:
    """Each rank's value, in their order, on the first rank; nothing on the others."""
    if axis.size == 1:
        return [value]
    values = [value] * axis.size if axis.rank == 0 else []
    dist.gather_object(value, values or None, group=axis.group, group_dst=0)
    return values


def everyones_in_turn(mine: list[T], axis: Axis) -> list[T]:
    """What all ranks made of things, rank r of those at r, r + size and so on, in the things' order, on every rank."""
    parts = everyones(mine, axis)
    return [parts[number % axis.size][number // axis.size] for number in range(sum(map(len, parts)))]


@dataclass(frozen=True)
class Pending:
    """A collective under way: whatever is computed before `wait` overlaps with it. `waits` counts the rest."""

    result: Tensor
    work: dist.Work | None
    waits: Waits | None = None

    def wait(self) -> Tensor:
        """The result, once it is there."""
        if self.work is not None and self.waits is None:
            self.work.wait()
        elif self.work is not None and self.waits is not None:
            self.waits.during(self.work.wait)
        return self.result

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.work is None or self.work.is_completed()


def start_all_reduce(tensor: Tensor, axis: Axis) -> Pending:
    """`all_reduce_sum`, begun; `tensor` is not to be touched until it is waited for."""
    work = dist.all_reduce(tensor, group=axis.group, async_op=True) if axis.size > 1 else None
    return Pending(tensor, work, axis.waits)


def start_all_gather(tensor: Tensor, axis: Axis) -> Pending:
    """`all_gather`, begun."""
    if axis.size == 1:
        return Pending(tensor, None)
    whole = tensor.new_empty(axis.size * tensor.shape[0], *tensor.shape[1:])
    # torch 2.13 has the first name and deprecates the second; 2.11 has the second alone.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return Pending(whole, gather(whole, tensor.contiguous(), group=axis.group, async_op=True), axis.waits)


def start_reduce_scatter(tensor: Tensor, axis: Axis) -> Pending:
    """`reduce_scatter`, begun; the first dimension is divisible by the axis' size."""
    if axis.size == 1:
        return Pending(tensor, None)
    mine = tensor.new_empty(tensor.shape[0] // axis.size, *tensor.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return Pending(mine, scatter(mine, tensor.contiguous(), group=axis.group, async_op=True), axis.waits)


def start_exchange(tensor: Tensor, to_each: Sequence[int], from_each: Sequence[int], axis: Axis) -> Pending:
    """Begin to send `to_each[r]` elements of `tensor`, which lie in the ranks' order, to rank r of the axis.

    The result: `from_each[r]` elements of rank r, in the ranks' order. Not differentiable.
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
    """Forward: the whole tensor as it is. Backward: the partial gradients, summed over the axis."""
    return _SumGradients.apply(tensor, axis) if axis.size > 1 else tensor


def sum_outputs(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: the partial tensors, summed over the axis, in place. Backward: the whole gradient as it is."""
    return _SumOutputs.apply(tensor, axis) if axis.size > 1 else tensor


def sum_to_slices(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: this rank's tokens of the sum of partial tensors. Backward: the gradients of all ranks' tokens."""
    return _SumToSlices.apply(tensor, axis) if axis.size > 1 else tensor


def gather_slices(tensor: Tensor, axis: Axis) -> Tensor:
    """Forward: all ranks' tokens, whole. Backward: of the partial gradients' sum, this rank's tokens."""
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
