"""Placement: which part of a parameter each rank holds. Initialisation, checkpoints and the gradient's norm use it.

A parameter's *whole* is the tensor that a single rank would hold; its *local* tensor is this rank's part. A parameter
without a placement is whole on every rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.waits import read


@dataclass(frozen=True)
class Placement:
    """Which part of one parameter this rank holds: of tensor-parallel slices, data-parallel shards, pipeline stages."""

    axis: Axis = ONE_RANK_AXIS  # the tensor axis
    dim: int | None = None  # the dimension of which tensor rank r holds the r-th slice; None: each holds the whole
    # The whole's extent along `dim`. The slices together may be longer: their end is padding, always 0.
    whole_size: int = 0
    has_partial_gradient: bool = False  # held whole on the tensor axis, but its gradient is the sum over these ranks
    shards: Axis = ONE_RANK_AXIS  # data-parallel ranks that share the rows (dimension 0) of a slice
    num_rows: int = 0  # of the slice that `shards` share: ceil(num_rows / shards) on each, fewer on the last ones
    # First and last pipeline rank if both hold the parameter: its gradient is the sum over the two; in the norm the
    # first rank's counts.
    ends: Axis = ONE_RANK_AXIS

    def whole_shape(self, local: Tensor) -> tuple[int, ...]:
        """The shape of the whole of which `local` is this rank's part."""
        shape = tuple(local.shape) if self.shards.size == 1 else (self.num_rows, *local.shape[1:])
        return tuple(self.whole_size if dim == self.dim else size for dim, size in enumerate(shape))

    def part(self, local: Tensor) -> "Part":
        """`local`, without its padding, and its place in the whole. A scalar, such as a step count, is not split."""
        if local.ndim == 0:
            return Part(local, (), ())
        offsets, held = [0] * local.ndim, local.detach()
        if self.shards.size > 1:
            offsets[0] = self.shards.rank * -(-self.num_rows // self.shards.size)
        if self.dim is not None and self.axis.size > 1:
            size = self.num_rows if self.dim == 0 and self.shards.size > 1 else local.shape[self.dim]
            offsets[self.dim] += self.axis.rank * size
            held = held.narrow(self.dim, 0, min(held.shape[self.dim], max(0, self.whole_size - offsets[self.dim])))
        return Part(held, tuple(offsets), self.whole_shape(local))

    def box_on(self, whole_shape: tuple[int, ...], tensor_rank: int, shard: int) -> tuple[slice, ...]:
        """The slices of the whole that the rank with these numbers on the tensor and shards axes holds.

        For a whole without padding: its extent along `dim` divides evenly.
        """
        box = [slice(0, size) for size in whole_shape]
        if self.dim is not None and self.axis.size > 1:
            size = whole_shape[self.dim] // self.axis.size
            box[self.dim] = slice(tensor_rank * size, (tensor_rank + 1) * size)
        if self.shards.size > 1:
            start, end = box[0].start, box[0].stop
            size = -(-(end - start) // self.shards.size)
            box[0] = slice(min(start + shard * size, end), min(start + (shard + 1) * size, end))
        return tuple(box)

    def cut(self, whole: Tensor, local: Tensor) -> Tensor:
        """This rank's part of `whole`, padded with 0 to the shape of `local`."""
        if whole.ndim == 0:
            return whole
        mine = whole.new_zeros(local.shape)
        part = self.part(mine)
        part.tensor.copy_(whole[part.box])
        return mine


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor, and its values."""

    tensor: Tensor  # a view of what this rank holds
    offsets: tuple[int, ...]  # where it begins in the whole
    whole_shape: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """The slices of the whole that `tensor` holds."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.tensor.shape, strict=True))


def placement_of(parameter: Tensor) -> Placement:
    """The placement that `parameter` carries; whole on every rank if it has none."""
    return getattr(parameter, "placement", Placement())


def part_of_state(parameter: Tensor, state: Tensor) -> Part:
    """The part of an optimizer's state for `parameter` that this rank holds.

    It is split as the parameter; with fewer dimensions (a step count, one number per row) whole on every rank.
    """
    placement = placement_of(parameter) if state.ndim == parameter.ndim else Placement()
    return placement.part(state)


def gradient_norm(parameters: Iterable[nn.Parameter], pipeline: Axis = ONE_RANK_AXIS) -> Tensor:
    """The L2 norm (fp32 scalar) of the whole gradients of the model: each element counts once. A collective."""
    by_axes: dict[tuple[Axis, ...], list[Tensor]] = {(): []}
    parameters = list(parameters)
    for parameter in parameters:
        placement = placement_of(parameter)
        if parameter.grad is not None and placement.ends.rank == 0:
            tensor_axis = [placement.axis] if placement.dim is not None else []
            axes = tuple(axis for axis in (*tensor_axis, placement.shards) if axis.size > 1)
            by_axes.setdefault(axes, []).append(parameter.grad)
    square = torch.zeros((), device=parameters[0].device)  # stays 0 if all parameters of this rank are frozen
    for axes, gradients in by_axes.items():
        if not gradients:
            continue
        part = torch.nn.utils.get_total_norm(gradients).square()
        for axis in axes:
            part = all_reduce_sum(part, axis)
        square = part + square
    return all_reduce_sum(square, pipeline).sqrt()


def is_any_trained(parameters: Iterable[nn.Parameter], pipeline: Axis) -> bool:
    """Whether any rank of `pipeline` trains a parameter; a collective, so call it on all ranks."""
    parameters = list(parameters)
    here = sum(parameter.requires_grad for parameter in parameters)
    everywhere = all_reduce_sum(torch.tensor(here, device=parameters[0].device), pipeline)
    return here > 0 or int(read(everywhere)) > 0


def partial_gradients(parameters: Iterable[nn.Parameter], replicas: Axis) -> dict[Axis, list[Tensor]]:
    """The gradients that have to be summed over each axis, by axis; `replicas` first."""
    partial: dict[Axis, list[Tensor]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        placement = placement_of(parameter)
        for axis in (replicas, placement.axis if placement.has_partial_gradient else ONE_RANK_AXIS, placement.ends):
            if axis.size > 1:
                assert parameter.grad is not None, "every parameter that is trained takes part in the loss"
                partial.setdefault(axis, []).append(parameter.grad)
    return partial
