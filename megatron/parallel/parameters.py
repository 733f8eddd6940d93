"""Parameters that carry a declaration: initial values, optimizer group, weight decay. It is given where one is created.

Initialisation and optimizer read it from the parameter. Which part of it each rank holds is its `Placement`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.placement import Placement

Group = Literal["matrix", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from a normal distribution around 0."""

    std: float

    def values(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """The whole, fp32, drawn on the CPU: the same values for every device and layout."""
        return torch.empty(*shape, device="cpu").normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Initial values drawn from a uniform distribution between -bound and bound."""

    bound: float

    def values(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """The whole, fp32, drawn on the CPU: the same values for every device and layout."""
        return torch.empty(*shape, device="cpu").uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """The same initial value everywhere."""

    value: float

    def values(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """The whole, fp32, on the CPU."""
        return torch.full(tuple(shape), self.value, device="cpu")


Initial = Normal | Uniform | Constant


@dataclass(frozen=True)
class Declaration:
    """What one parameter is.

    `group` decides which optimizer and learning rate it gets. "matrix": weights of linear layers; "embedding": tables
    whose rows are looked up; "head": parameters of the vocabulary's logits; "vector": biases and scales.
    """

    initial: Initial
    group: Group
    decays: bool  # whether weight decay applies
    is_trained: bool = True  # False: only loaded and saved
    # Of a weight that interleaves the rows of several matrices: how many rows of each follow each other before the next
    # one's, e.g. (4, 4, 4) for queries, keys and values of heads of width 4. (): a single matrix.
    runs: tuple[int, ...] = ()


BIAS = Declaration(Constant(0.0), "vector", decays=False)
SCALE = Declaration(Constant(1.0), "vector", decays=False)


def matrix(initial: Initial, runs: tuple[int, ...] = ()) -> Declaration:
    """The declaration of a linear layer's weight, or with `runs` of the interleaved weights of several layers."""
    return Declaration(initial, "matrix", decays=True, runs=runs)


def table(initial: Initial) -> Declaration:
    """The declaration of a table of embeddings."""
    return Declaration(initial, "embedding", decays=True)


def whole_parameter(shape: Sequence[int], declaration: Declaration) -> nn.Parameter:
    """A parameter that every rank holds whole, with the same gradient on every tensor rank."""
    return _declared(shape, declaration, Placement())


def split_parameter(shape: Sequence[int], dim: int, axis: Axis, declaration: Declaration, *,
                    local_size: int | None = None, ends: Axis = ONE_RANK_AXIS) -> nn.Parameter:
    """A parameter of whole shape `shape` of which each rank of `axis` holds a slice along `dim`.

    `local_size`: the slice's extent where the slices together are longer than the whole, which is padded. `ends`: the
    first and last pipeline rank where both hold the parameter.
    """
    local_shape = list(shape)
    local_shape[dim] = local_size or shape[dim] // axis.size
    assert local_shape[dim] * axis.size >= shape[dim], "the slices cover the whole"
    return _declared(local_shape, declaration, Placement(axis, dim, shape[dim], ends=ends))


def replicated_parameter(shape: Sequence[int], axis: Axis, declaration: Declaration, *,
                         has_partial_gradient: bool) -> nn.Parameter:
    """A parameter that every rank of `axis` holds whole.

    `has_partial_gradient`: each rank computes a part of its gradient, which is the sum over the axis.
    """
    return _declared(shape, declaration, Placement(axis, has_partial_gradient=has_partial_gradient))


def declaration_of(parameter: Tensor) -> Declaration:
    """The declaration that `parameter` carries."""
    declaration = getattr(parameter, "declaration", None)
    assert isinstance(declaration, Declaration), "a parameter is declared where it is made"
    return declaration


def inherit(parameter: Tensor, predecessor: Tensor) -> None:
    """Give `parameter`, which replaces `predecessor`, the declaration and the placement of that."""
    for name in ("declaration", "placement"):
        if hasattr(predecessor, name):
            setattr(parameter, name, getattr(predecessor, name))


def _declared(shape: Sequence[int], declaration: Declaration, placement: Placement) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape), requires_grad=declaration.is_trained)
    parameter.declaration, parameter.placement = declaration, placement  # type: ignore[attr-defined]
    return parameter
