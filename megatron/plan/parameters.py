"""Lists the parameters that a rank holds and their sizes, read from the model's stages, built on `meta`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain, groupby

from torch import nn

from megatron.parallel.mesh import ONE_RANK_AXIS, Axis, Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.tensor.layers import Matrix
from megatron.plan.memory_watch import num_bytes
from megatron.plan.setting import BlockRange, Setting


@dataclass(frozen=True)
class Parameter:
    """A parameter as one tensor rank holds it."""

    shape: tuple[int, ...]  # on this rank
    is_split: bool  # the other tensor ranks hold other slices of it
    is_partial: bool  # every tensor rank holds all of it, but only a part of its gradient, to be summed
    is_at_ends: bool  # the first and the last pipeline rank both hold it
    is_trained: bool  # it has a gradient
    block: int | None  # the number of its block in the model, None outside the blocks
    copy_bytes: int  # of its copy for matrix products, which exists if parameters are not sharded
    has_history: bool  # its layer uses delayed scaling in FP8
    matrix: nn.Parameter | None = field(compare=False)  # the parameter, on `meta`, if Muon treats it as a matrix

    @cached_property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def whole_rows(self) -> int:
        """The number of rows of the whole matrix, on all tensor ranks; 0 for parameters that are no matrix."""
        return 0 if self.matrix is None else placement_of(self.matrix).whole_shape(self.matrix)[0]

    def padded(self, shards: int) -> int:
        """The number of elements, with rows padded to a multiple of `shards`."""
        return self.size // self.shape[0] * (-(-self.shape[0] // shards) * shards)

    def share(self, shards: int, shard: int) -> int:
        """The number of elements in share `shard` of `shards`: equally many rows in each, fewer in the last ones."""
        rows = -(-self.shape[0] // shards)
        return self.size // self.shape[0] * min(max(self.shape[0] - shard * rows, 0), rows)


@dataclass(frozen=True, eq=False)
class Held:
    """The parameters of one stage, or of all stages of a rank, in the model's order."""

    parameters: Sequence[Parameter]

    @cached_property
    def copies(self) -> int:
        """Bytes of the copies for matrix products, which exist if parameters are not sharded."""
        return sum(parameter.copy_bytes for parameter in self)

    @cached_property
    def trained(self) -> "Held":
        """The parameters that have gradients."""
        if all(parameter.is_trained for parameter in self):
            return self
        return Held([parameter for parameter in self if parameter.is_trained])

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    @cached_property
    def size(self) -> int:
        """The total number of elements."""
        return sum(parameter.size for parameter in self)


@cache
def share_size(held: Held, shards: int, shard: int) -> int:
    """The number of elements in a rank's shares of the parameters."""
    return sum(parameter.share(shards, shard) for parameter in held)


@cache
def matrices_of(held: Held) -> Held:
    """The parameters that Muon treats as matrices."""
    return Held([parameter for parameter in held if parameter.matrix is not None])


@cache
def sharded_units(held: Held, shards: int) -> dict[int | None, int]:
    """The elements of a stage's parameters that are gathered together: of each block, then of all outside (None).

    Rows are padded to a multiple of the shards.
    """
    sizes: dict[int | None, int] = {}
    for parameter in sorted(held, key=lambda parameter: parameter.block is None):
        sizes[parameter.block] = sizes.get(parameter.block, 0) + parameter.padded(shards)
    return sizes


@cache
def together(stages: tuple[Held, ...]) -> Held:
    """The parameters of all stages of a rank."""
    if len(stages) == 1:
        return stages[0]
    return Held([parameter for held in stages for parameter in held])


@cache
def held_by(setting: Setting, part: BlockRange, has_pipeline: bool) -> Held:
    """The parameters of a stage; of blocks of the same kind only one is built, for speed.

    `has_pipeline`: whether there are several pipeline ranks.
    """
    with_one = part._replace(blocks=setting.alike(part.blocks[:1] or range(1)))
    found: list[Parameter] = []
    for is_block, group in groupby(_built(setting, with_one, has_pipeline), key=_is_in_block):
        found += _of_blocks(setting, part.blocks) if is_block else group
    return Held(found)


def _of_blocks(setting: Setting, blocks: range) -> Iterator[Parameter]:
    """The parameters of the blocks with these numbers."""
    for number in blocks:
        one = BlockRange(False, setting.alike(range(number, number + 1)), False)
        yield from (replace(parameter, block=number) for parameter in filter(_is_in_block, _built(setting, one, False)))


def _is_in_block(parameter: Parameter) -> bool:
    return parameter.block is not None


@cache
def _built(setting: Setting, part: BlockRange, has_pipeline: bool) -> list[Parameter]:
    """The parameters of a part of the model, which is built on `meta`."""
    mesh = Mesh(tensor=setting.tensor, context=setting.context)
    model = setting.build(part, mesh, Axis(0 if part.is_first else 1, 2) if has_pipeline else ONE_RANK_AXIS)
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
