"""Which parameters a rank holds, and how many elements of each: read from the model's own stages, built on `meta`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.placement import placement_of
from megatron.plan.pieces import Part, Setting
from megatron.plan.rank import Rank, part_of


@dataclass(frozen=True)
class Parameter:
    """A parameter on one tensor rank.

    `is_split`: other tensor ranks hold other slices. `is_partial`: held whole by all of them, each with a part of its
    gradient. `is_at_ends`: the first and the last pipeline rank both hold it. `block`: the number of its block in the
    stage, None outside the blocks.
    """

    shape: tuple[int, ...]
    is_split: bool
    is_partial: bool
    is_at_ends: bool
    block: int | None

    @property
    def size(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

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


def stage_parameters(rank: Rank, stage: Stage) -> Sequence[Parameter]:
    """The parameters of one stage, in the order in which the model names them."""
    return _part_parameters(rank, part_of(stage))


def rank_parameters(rank: Rank) -> list[Parameter]:
    """The parameters of all stages of the rank."""
    return [parameter for stage in rank.stages for parameter in stage_parameters(rank, stage)]


def share_size(rank: Rank, stage: Stage) -> int:
    """Elements of a stage's parameters that this rank holds when it needs no others."""
    return sum(parameter.share(rank.shards, rank.shard) for parameter in stage_parameters(rank, stage))


def tied_size(rank: Rank, stage: Stage) -> int:
    """Elements of the parameters that both what comes before the blocks and what follows them use, in one stage."""
    if not (stage.is_first and stage.is_last):
        return 0
    ends = (Part(True, 0, False), Part(False, 0, True), Part(True, 0, True))
    before, behind, both = (sum(p.size for p in _part_parameters(rank, part)) for part in ends)
    return before + behind - both


def sharded_units(rank: Rank, stage: Stage) -> Sequence[Unit]:
    """What is gathered together: each block, then what is outside the blocks."""
    sizes: dict[int | None, int] = dict.fromkeys((*range(len(stage.layers)), None), 0)
    for parameter in stage_parameters(rank, stage):
        sizes[parameter.block] += parameter.padded(rank.shards)
    return [Unit(block, size) for block, size in sizes.items() if size]


def _part_parameters(rank: Rank, part: Part) -> Sequence[Parameter]:
    return _parameters(rank.setting._replace(num_rows=0), part, rank.sizes["pipeline"] > 1)


@cache  # a search asks for the same stages thousands of times
def _parameters(setting: Setting, part: Part, has_pipeline: bool) -> Sequence[Parameter]:
    mesh = Mesh(tensor=setting.tensor, context=setting.context)
    with torch.device("meta"):
        model = setting.build(part, mesh, ends=Axis(0 if part.is_first else 1, 2) if has_pipeline else None)
    blocks = {id(parameter): number for number, block in enumerate(model.blocks()) for parameter in block.parameters()}
    found = []
    for parameter in model.parameters():
        placement = placement_of(parameter)
        has_axis = placement.axis.size > 1
        found.append(Parameter(tuple(parameter.shape), has_axis and placement.dim is not None,
                               has_axis and placement.has_partial_gradient, placement.ends.size > 1,
                               blocks.get(id(parameter))))
    return found
