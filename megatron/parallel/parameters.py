"""What a parameter is, declared where it is born: its initial values, its group, whether it decays, how it is split.

Initialisation and optimizer read it there. How the parameter lies on the ranks is its `Placement`.
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
    """Initial values drawn evenly from -bound to bound."""

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

    `group`: the parameters that an optimizer, or a learning rate, is chosen for together. "matrix": the weights of
    linear layers; "embedding": tables of which rows are looked up; "head": what is particular to the vocabulary's
    logits; "vector": biases and scales. `decays`: whether weight decay pulls it towards 0. `is_trained`: whether it is
    ever; what is not is carried along. `runs`: of several matrices whose rows take turns, how many rows each has in a
    turn; (): it is one matrix.
    """

    initial: Initial
    group: Group
    decays: bool
    is_trained: bool = True
    runs: tuple[int, ...] = ()


BIAS = Declaration(Constant(0.0), "vector", decays=False)
SCALE = Declaration(Constant(1.0), "vector", decays=False)


def matrix(initial: Initial, runs: tuple[int, ...] = ()) -> Declaration:
    """What the weight of a linear layer is, or of several with one input, whose rows take turns."""
    return Declaration(initial, "matrix", decays=True, runs=runs)


def table(initial: Initial) -> Declaration:
    """What a table of embeddings is."""
    return Declaration(initial, "embedding", decays=True)


def whole_parameter(shape: Sequence[int], declaration: Declaration) -> nn.Parameter:
    """A parameter that every rank holds whole, with the same gradient on each."""
    return _declared(shape, declaration, Placement())


def split_parameter(shape: Sequence[int], dim: int, axis: Axis, declaration: Declaration, *,
                    local_size: int | None = None, ends: Axis = ONE_RANK_AXIS) -> nn.Parameter:
    """A parameter of which each rank holds a slice along `dim`, of `local_size` where the slices do not just fit.

    The `ends` are the pipeline ranks that both hold it.
    """
    local_shape = list(shape)
    local_shape[dim] = local_size or shape[dim] // axis.size
    assert local_shape[dim] * axis.size >= shape[dim], "the slices cover the whole"
    return _declared(local_shape, declaration, Placement(axis, dim, shape[dim], ends=ends))


def replicated_parameter(shape: Sequence[int], axis: Axis, declaration: Declaration, *,
                         has_partial_gradient: bool) -> nn.Parameter:
    """A parameter that every rank of `axis` holds whole."""
    return _declared(shape, declaration, Placement(axis, has_partial_gradient=has_partial_gradient))


def declaration_of(parameter: Tensor) -> Declaration:
    """What `parameter` is."""
    declaration = getattr(parameter, "declaration", None)
    assert isinstance(declaration, Declaration), "a parameter is declared where it is made"
    return declaration


def inherit(parameter: Tensor, predecessor: Tensor) -> None:
    """Let `parameter`, which takes the place of `predecessor`, be what that is and lie as that lies."""
    for name in ("declaration", "placement"):
        if hasattr(predecessor, name):
            setattr(parameter, name, getattr(predecessor, name))


def _declared(shape: Sequence[int], declaration: Declaration, placement: Placement) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape), requires_grad=declaration.is_trained)
    parameter.declaration, parameter.placement = declaration, placement  # type: ignore[attr-defined]
    return parameter
