"""Parameters know how they lie on the tensor axis: initialisation, checkpoints and the gradient's norm read it there.

A parameter's *whole* value is what one rank would hold; its *local* value is this rank's. A parameter without a
placement is whole on every rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.parallel.collectives import all_gather, all_reduce_sum
from megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class Placement:
    """How one parameter lies on `axis`.

    `dim`: the dimension along which rank r holds the r-th slice; None: every rank holds the whole. `whole_size`: the
    whole's extent along `dim`; where the slices together are longer, their end is padding, always 0, that no whole
    has. `has_partial_gradient`: a parameter that is held whole, but each rank's gradient is only a part of the sum.
    """

    axis: Axis = Axis()
    dim: int | None = None
    whole_size: int = 0
    has_partial_gradient: bool = False

    def whole_shape(self, local: Tensor) -> tuple[int, ...]:
        """The shape of the whole of which `local` is this rank's part."""
        return tuple(self.whole_size if dim == self.dim else size for dim, size in enumerate(local.shape))

    def cut(self, whole: Tensor, local: Tensor) -> Tensor:
        """This rank's part of `whole`, in the shape of `local`. A scalar, such as a step count, has no parts."""
        if self.dim is None or self.axis.size == 1 or whole.ndim == 0:
            return whole
        size = local.shape[self.dim]
        start = min(self.axis.rank * size, self.whole_size)
        mine = whole.narrow(self.dim, start, min(size, self.whole_size - start))
        missing = size - mine.shape[self.dim]
        return F.pad(mine, [0, 0] * (whole.ndim - 1 - self.dim) + [0, missing]).clone()

    def gather(self, local: Tensor) -> Tensor:
        """The whole, on every rank of the axis: all of them call this. `local` is not copied where it is the whole."""
        if self.dim is None or self.axis.size == 1 or local.ndim == 0:
            return local
        slices = all_gather(local.detach().movedim(self.dim, 0).contiguous(), self.axis)
        return slices.narrow(0, 0, self.whole_size).movedim(0, self.dim)


def split_parameter(shape: Sequence[int], dim: int, axis: Axis, *, local_size: int | None = None) -> nn.Parameter:
    """A parameter of which each rank holds a slice along `dim`, of `local_size` where the slices do not just fit."""
    local_shape = list(shape)
    local_shape[dim] = local_size or shape[dim] // axis.size
    assert local_shape[dim] * axis.size >= shape[dim], "the slices cover the whole"
    return _placed(torch.empty(local_shape), Placement(axis, dim, shape[dim]))


def replicated_parameter(shape: Sequence[int], axis: Axis, *, has_partial_gradient: bool) -> nn.Parameter:
    """A parameter that every rank of `axis` holds whole."""
    return _placed(torch.empty(*shape), Placement(axis, has_partial_gradient=has_partial_gradient))


def placement_of(parameter: Tensor) -> Placement:
    """How `parameter` lies on the tensor axis."""
    return getattr(parameter, "placement", Placement())


def wholes(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The wholes of a checkpoint's tensors, each named `PARAMETER` or `KIND/PARAMETER`, on the CPU; {} unless `keep`.

    All ranks of the tensor axis call this together, and one of them keeps: no device holds more than one whole.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = placement_of(parameters[name.split("/")[-1]]).gather(tensor)
        if keep:
            kept[name] = whole.detach().cpu()
    return kept


def parts(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of the tensors that `wholes` gave."""
    named = ((name, tensor, parameters[name.split("/")[-1]]) for name, tensor in tensors.items())
    return {name: placement_of(parameter).cut(tensor, parameter) for name, tensor, parameter in named}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm (fp32 scalar) of the gradients' wholes: each element counts once, on every rank alike."""
    split: dict[Axis, list[Tensor]] = {}
    here: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            placement = placement_of(parameter)
            is_split = placement.dim is not None and placement.axis.size > 1
            (split.setdefault(placement.axis, []) if is_split else here).append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(here)
    for axis, gradients in split.items():
        square = all_reduce_sum(torch.nn.utils.get_total_norm(gradients).square(), axis)
        norm = (square + norm.square()).sqrt()
    return norm


def partial_gradients(parameters: Iterable[nn.Parameter]) -> dict[Axis, list[Tensor]]:
    """For each axis the gradients that are yet to be summed over it; zeros where a rank has no part in one."""
    partial: dict[Axis, list[Tensor]] = {}
    for parameter in parameters:
        placement = placement_of(parameter)
        if placement.has_partial_gradient and placement.axis.size > 1:
            assert parameter.grad is not None, "every parameter takes part in the loss"
            partial.setdefault(placement.axis, []).append(parameter.grad)
    return partial


def _placed(tensor: Tensor, placement: Placement) -> nn.Parameter:
    parameter = nn.Parameter(tensor)
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter
