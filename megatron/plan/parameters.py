"""Which parameters a rank holds, and how many elements of each: read from the model's own stages, built on `meta`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain, groupby
from typing import NamedTuple

from torch import nn

from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.tensor.layers import Matrix
from megatron.plan.memory_watch import num_bytes
from megatron.plan.setting import BlockRange, Setting


@dataclass(frozen=True)
class Parameter:
    """A parameter on one tensor rank.

    `is_split`: other tensor ranks hold other slices. `is_partial`: held whole by all of them, each with a part of its
    gradient. `is_at_ends`: the first and the last pipeline rank both hold it. `is_trained`: it has a gradient. `block`:
    the number of its block in the model, None outside the blocks. `copy_bytes`: of the copy for matrix products, where
    each rank has all parameters. `matrix`: of a matrix of linear layers, it itself on `meta`; None of others.
    `has_history`: its layer's scales in FP8 are delayed.
    """

    shape: tuple[int, ...]
    is_split: bool
    is_partial: bool
    is_at_ends: bool
    is_trained: bool
    block: int | None
    copy_bytes: int
    has_history: bool
    matrix: nn.Parameter | None = field(compare=False)

    @cached_property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def whole_rows(self) -> int:
        """Of a matrix of linear layers, the rows of the whole; 0 of others."""
        return 0 if self.matrix is None else placement_of(self.matrix).whole_shape(self.matrix)[0]

    def padded(self, shards: int) -> int:
        """Elements when rows are added until each of `shards` ranks has as many."""
        return self.size // self.shape[0] * (-(-self.shape[0] // shards) * shards)

    def share(self, shards: int, shard: int) -> int:
        """Elements of share number `shard`: rows, as many for each but for the last."""
        rows = -(-self.shape[0] // shards)
        return self.size // self.shape[0] * min(max(self.shape[0] - shard * rows, 0), rows)


class Unit(NamedTuple):
    """Parameters that are gathered together, of one `block` or of what is outside: their elements, rows evened out."""

    block: int | None
    padded_size: int


@dataclass(frozen=True, eq=False)
class Held:
    """The parameters of one stage or of all stages of a rank, in the order in which the model names them."""

    parameters: Sequence[Parameter]

    @cached_property
    def copies(self) -> int:
        """Bytes of the copies for matrix products that are kept where each rank has all parameters."""
        return sum(parameter.copy_bytes for parameter in self)

    @cached_property
    def trained(self) -> "Held":
        """Those that have gradients."""
        if all(parameter.is_trained for parameter in self):
            return self
        return Held([parameter for parameter in self if parameter.is_trained])

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    @cached_property
    def size(self) -> int:
        """Elements."""
        return sum(parameter.size for parameter in self)


@cache
def share_size(held: Held, shards: int, shard: int) -> int:
    """Elements of the parameters that a rank holds when it needs no others."""
    return sum(parameter.share(shards, shard) for parameter in held)


@cache
def matrices_of(held: Held) -> Held:
    """Those that are matrices of linear layers."""
    return Held([parameter for parameter in held if parameter.matrix is not None])


@cache
def sharded_units(held: Held, shards: int) -> Sequence[Unit]:
    """What of a stage is gathered together: each block, then what is outside the blocks."""
    sizes: dict[int | None, int] = {}
    for parameter in sorted(held, key=lambda parameter: parameter.block is None):
        sizes[parameter.block] = sizes.get(parameter.block, 0) + parameter.padded(shards)
    return [Unit(block, size) for block, size in sizes.items()]


@cache
def together(stages: tuple[Held, ...]) -> Held:
    """The parameters of all stages of a rank."""
    if len(stages) == 1:
        return stages[0]
    return Held([parameter for held in stages for parameter in held])


@cache
def held_by(setting: Setting, part: BlockRange, has_pipeline: bool) -> Held:
    """The parameters of a stage; of blocks that are alike one is built, and counted as often as it comes."""
    with_one = part._replace(blocks=setting.alike(part.blocks[:1] or range(1)))
    found: list[Parameter] = []
    for is_block, group in groupby(_built(setting, with_one, has_pipeline), key=_is_in_block):
        found += _of_blocks(setting, part.blocks) if is_block else group
    return Held(found)


def _of_blocks(setting: Setting, blocks: range) -> Iterator[Parameter]:
    for number in blocks:
        one = BlockRange(False, setting.alike(range(number, number + 1)), False)
        yield from (replace(parameter, block=number) for parameter in filter(_is_in_block, _built(setting, one, False)))


def _is_in_block(parameter: Parameter) -> bool:
    return parameter.block is not None


@cache
def _built(setting: Setting, part: BlockRange, has_pipeline: bool) -> list[Parameter]:
    mesh = Mesh(tensor=setting.tensor, context=setting.context)
    model = setting.build(part, mesh, Axis(0 if part.is_first else 1, 2) if has_pipeline else Axis())
    copies = {id(parameter): num_bytes(made) for layer in model.modules() if isinstance(layer, Matrix)
              for parameter, made in ((layer.weight, [layer.copy, *chain(*layer.fp8_copy or ())]),
                                      (getattr(layer, "bias", None), [layer.bias_copy]))}
    delayed = {id(layer.weight) for layer in model.modules() if isinstance(layer, Matrix)
               and layer.amaxes.input.known is not None}
    in_block = {id(parameter) for block in model.blocks() for parameter in block.parameters()}
    found = []
    for parameter in model.parameters():
        placement = placement_of(parameter)
        has_axis = placement.axis.size > 1
        found.append(Parameter(tuple(parameter.shape), has_axis and placement.dim is not None,
                               has_axis and placement.has_partial_gradient, placement.ends.size > 1,
                               parameter.requires_grad, 0 if id(parameter) in in_block else None,
                               copies.get(id(parameter), 0), id(parameter) in delayed,
                               parameter if declaration_of(parameter).group == "matrix" else None))
    return found
