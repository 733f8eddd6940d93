"""Parameters know how they lie on the ranks: initialisation, checkpoints and the gradient's norm read it there.

A parameter's *whole* value is what one rank would hold; its *local* value is this rank's. A parameter without a
placement is whole on every rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class Placement:
    """How one parameter lies on the tensor axis `axis`, and on those of data and pipeline parallelism.

    `dim`: the dimension along which tensor rank r holds the r-th slice; None: every rank holds the whole. `whole_size`:
    the whole's extent along `dim`; where the slices together are longer, their end is padding, always 0, which no whole
    has. `has_partial_gradient`: a parameter that is held whole, but each rank's gradient is only a part of the sum.
    `shards`: the ranks that share out the `num_rows` rows (dimension 0) of what a tensor rank holds, as many on each
    but for the last. `ends`: the first and the last pipeline rank, which both hold the parameter, each with a part of
    its gradient; the first one's counts.
    """

    axis: Axis = field(default_factory=Axis)
    dim: int | None = None
    whole_size: int = 0
    has_partial_gradient: bool = False
    shards: Axis = field(default_factory=Axis)
    num_rows: int = 0
    ends: Axis = field(default_factory=Axis)

    def whole_shape(self, local: Tensor) -> tuple[int, ...]:
        """The shape of the whole of which `local` is this rank's part."""
        shape = tuple(local.shape) if self.shards.size == 1 else (self.num_rows, *local.shape[1:])
        return tuple(self.whole_size if dim == self.dim else size for dim, size in enumerate(shape))

    def part(self, local: Tensor) -> "Part":
        """What `local` holds of the whole, without its padding. A scalar, such as a step count, has no parts."""
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
        """What tensor rank number `tensor_rank`, with share number `shard`, holds of a whole that divides evenly."""
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
        """This rank's part of `whole`, in the shape of `local`."""
        if whole.ndim == 0:
            return whole
        mine = whole.new_zeros(local.shape)
        part = self.part(mine)
        part.tensor.copy_(whole[part.box])
        return mine


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor: `tensor`, a view of what this rank holds, begins there at `offsets`."""

    tensor: Tensor
    offsets: tuple[int, ...]
    whole_shape: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """Its place in the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.tensor.shape, strict=True))


def placement_of(parameter: Tensor) -> Placement:
    """How `parameter` lies on the ranks."""
    return getattr(parameter, "placement", Placement())


def part_of_state(parameter: Tensor, state: Tensor) -> Part:
    """What an optimizer's `state` for `parameter` holds of the whole: it lies as that does, or where it has fewer
    dimensions, as a count or a number a row, whole on every rank."""
    placement = placement_of(parameter) if state.ndim == parameter.ndim else Placement()
    return placement.part(state)


def gradient_norm(parameters: Iterable[nn.Parameter], pipeline: Axis | None = None) -> Tensor:
    """The L2 norm (fp32 scalar) of the gradients' wholes: each element counts once, on every rank alike."""
    by_axes: dict[tuple[Axis, ...], list[Tensor]] = {(): []}
    parameters = list(parameters)
    for parameter in parameters:
        placement = placement_of(parameter)
        if parameter.grad is not None and placement.ends.rank == 0:
            tensor_axis = [placement.axis] if placement.dim is not None else []
            axes = tuple(axis for axis in (*tensor_axis, placement.shards) if axis.size > 1)
            by_axes.setdefault(axes, []).append(parameter.grad)
    square = torch.zeros((), device=parameters[0].device)  # and no more where all of this rank's are frozen
    for axes, gradients in by_axes.items():
        if not gradients:
            continue
        part = torch.nn.utils.get_total_norm(gradients).square()
        for axis in axes:
            part = all_reduce_sum(part, axis)
        square = part + square
    return all_reduce_sum(square, pipeline or Axis()).sqrt()


def is_any_trained(parameters: Iterable[nn.Parameter], pipeline: Axis) -> bool:
    """Whether a rank of `pipeline` has a parameter that is not frozen: all of them call this.

    Those that have one know the answer without waiting for it.
    """
    parameters = list(parameters)
    here = sum(parameter.requires_grad for parameter in parameters)
    everywhere = all_reduce_sum(torch.tensor(here, device=parameters[0].device), pipeline)
    return here > 0 or everywhere.item() > 0


def partial_gradients(parameters: Iterable[nn.Parameter], replicas: Axis) -> dict[Axis, list[Tensor]]:
    """For each axis, that of `replicas` first, the gradients that are yet to be summed over it."""
    partial: dict[Axis, list[Tensor]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        placement = placement_of(parameter)
        for axis in (replicas, placement.axis if placement.has_partial_gradient else Axis(), placement.ends):
            if axis.size > 1:
                assert parameter.grad is not None, "every parameter that is trained takes part in the loss"
                partial.setdefault(axis, []).append(parameter.grad)
    return partial
