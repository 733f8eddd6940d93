"""Parameters know how they lie on the ranks: initialisation, checkpoints and the gradient's norm read it there.

A parameter's *whole* value is what one rank would hold; its *local* value is this rank's. A parameter without a
placement is whole on every rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.parallel.collectives import all_gather, all_reduce_sum
from megatron.parallel.mesh import Axis
from megatron.parallel.pipeline.channels import collect


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
        return tuple(self.whole_size if dim == self.dim else size for dim, size in enumerate(self._tensor_shape(local)))

    def cut(self, whole: Tensor, local: Tensor) -> Tensor:
        """This rank's part of `whole`, in the shape of `local`. A scalar, such as a step count, has no parts."""
        if whole.ndim == 0:
            return whole
        mine = self._tensor_part(whole, self._tensor_shape(local))
        if self.shards.size == 1:
            return mine
        rows = -(-self.num_rows // self.shards.size)
        return mine[self.shards.rank * rows:(self.shards.rank + 1) * rows].clone()

    def gather(self, local: Tensor) -> Tensor:
        """The whole, on every rank of the axes: all of them call this. `local` is not copied where it is the whole."""
        if local.ndim == 0:
            return local
        if self.shards.size > 1:
            missing = -(-self.num_rows // self.shards.size) - len(local)
            padded = F.pad(local.detach(), [0, 0] * (local.ndim - 1) + [0, missing])
            local = all_gather(padded, self.shards)[:self.num_rows]
        if self.dim is None or self.axis.size == 1:
            return local
        slices = all_gather(local.detach().movedim(self.dim, 0).contiguous(), self.axis)
        return slices.narrow(0, 0, self.whole_size).movedim(0, self.dim)

    def _tensor_shape(self, local: Tensor) -> tuple[int, ...]:
        return tuple(local.shape) if self.shards.size == 1 else (self.num_rows, *local.shape[1:])

    def _tensor_part(self, whole: Tensor, shape: Sequence[int]) -> Tensor:
        if self.dim is None or self.axis.size == 1:
            return whole
        size = shape[self.dim]
        start = min(self.axis.rank * size, self.whole_size)
        mine = whole.narrow(self.dim, start, min(size, self.whole_size - start))
        missing = size - mine.shape[self.dim]
        return F.pad(mine, [0, 0] * (whole.ndim - 1 - self.dim) + [0, missing]).clone()


def placement_of(parameter: Tensor) -> Placement:
    """How `parameter` lies on the ranks."""
    return getattr(parameter, "placement", Placement())


def wholes(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, keep: bool,
           pipeline: Axis | None = None) -> dict[str, Tensor]:
    """The wholes of a checkpoint's tensors, each named `PARAMETER` or `KIND/PARAMETER`, on the CPU; {} unless `keep`.

    All ranks of the shards and tensor axes call this together, and one of them keeps: no device holds more than one
    whole. Those that keep, one a pipeline rank, hand them to the first of `pipeline`.
    """
    kept = {}
    for name, tensor in tensors.items():
        placement = placement_of(parameters[name.split("/")[-1]])
        whole = placement.gather(tensor)
        if keep and placement.ends.rank == 0:
            kept[name] = whole.detach().cpu()
    return collect(kept, pipeline) if keep and pipeline is not None else kept


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


def partial_gradients(parameters: Iterable[nn.Parameter]) -> dict[Axis, list[Tensor]]:
    """For each axis the gradients that are yet to be summed over it; zeros where a rank has no part in one."""
    partial: dict[Axis, list[Tensor]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        placement = placement_of(parameter)
        for axis in (placement.axis if placement.has_partial_gradient else Axis(), placement.ends):
            if axis.size > 1:
                assert parameter.grad is not None, "every parameter that is trained takes part in the loss"
                partial.setdefault(axis, []).append(parameter.grad)
    return partial
