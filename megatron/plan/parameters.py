"""Which parameters a rank holds, and how many elements of each: the model's own list, in its order, as formulas."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megatron.parallel.pipeline.partition import Stage
from megatron.plan.rank import Rank


@dataclass(frozen=True)
class Parameter:
    """A parameter on one tensor rank.

    `is_split`: other tensor ranks hold other slices. `is_partial`: held whole by all of them, each with a part of its
    gradient. `is_at_ends`: the first and the last pipeline rank both hold it. `block`: the transformer block, None
    outside the blocks.
    """

    name: str
    shape: tuple[int, ...]
    is_split: bool = False
    is_partial: bool = False
    is_at_ends: bool = False
    block: int | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def padded(self, shards: int) -> int:
        """Elements when rows are added until each of `shards` ranks has as many."""
        return self.size // self.shape[0] * (-(-self.shape[0] // shards) * shards)

    def share(self, shards: int, shard: int) -> int:
        """Elements of share number `shard`: rows, as many for each but for the last."""
        rows = -(-self.shape[0] // shards)
        return self.size // self.shape[0] * min(max(self.shape[0] - shard * rows, 0), rows)


class Widths(NamedTuple):
    """What the parameters of a stage depend on, besides its place: letters of `megatron.plan.rank`."""

    h: int
    nd: int
    f: int
    positions: int
    vocab_rows: int
    has_tensor: bool
    is_sequence: bool
    has_pipeline: bool


def stage_parameters(rank: Rank, stage: Stage) -> Sequence[Parameter]:
    """The parameters of one stage, in the order in which the model names them."""
    return _stage_parameters(_widths(rank), stage)


def share_size(rank: Rank, stage: Stage) -> int:
    """Elements of a stage's parameters that this rank holds when it needs no others."""
    return _share_size(_widths(rank), stage, rank.shards, rank.shard)


def _widths(rank: Rank) -> Widths:
    return Widths(rank.h, rank.nd, rank.f, rank.config.model.max_position_embeddings, rank.vocab_rows,
                  rank.sizes["tensor"] > 1, rank.is_sequence_parallel, rank.sizes["pipeline"] > 1)


@cache  # a search asks for the same stages thousands of times
def _stage_parameters(widths: Widths, stage: Stage) -> tuple[Parameter, ...]:
    h, is_partial = widths.h, widths.is_sequence
    found = []
    if stage.is_first or stage.is_last:
        found.append(Parameter("embedding.word_embeddings.weight", (widths.vocab_rows, h), is_split=widths.has_tensor,
                               is_at_ends=widths.has_pipeline))
    if stage.is_first:
        found.append(Parameter("embedding.position_embeddings.weight", (widths.positions, h), is_partial=is_partial))
    for number in stage.layers:
        found += _block_parameters(widths, number)
    if stage.is_last:
        found += [Parameter(f"transformer.final_layernorm.{name}", (h,), is_partial=is_partial)
                  for name in ("weight", "bias")]
        found.append(Parameter("lm_head.bias", (widths.vocab_rows,), is_split=widths.has_tensor))
        found += [Parameter("lm_head.dense.weight", (h, h)), Parameter("lm_head.dense.bias", (h,)),
                  Parameter("lm_head.layernorm.weight", (h,)), Parameter("lm_head.layernorm.bias", (h,))]
    return tuple(found)


@cache
def _share_size(widths: Widths, stage: Stage, shards: int, shard: int) -> int:
    return sum(parameter.share(shards, shard) for parameter in _stage_parameters(widths, stage))


def _block_parameters(widths: Widths, number: int) -> Iterator[Parameter]:
    h, nd, f, has_tensor = widths.h, widths.nd, widths.f, widths.has_tensor
    of_stream = [(h,), False, widths.is_sequence]
    shapes: dict[str, Sequence] = {
        "input_layernorm.weight": of_stream, "input_layernorm.bias": of_stream,
        "attention.query_key_value.weight": [(3 * nd, h), True, False],
        "attention.query_key_value.bias": [(3 * nd,), True, False],
        "attention.dense.weight": [(h, nd), True, False], "attention.dense.bias": [(h,), False, True],
        "post_attention_layernorm.weight": of_stream, "post_attention_layernorm.bias": of_stream,
        "mlp.dense_h_to_4h.weight": [(f, h), True, False], "mlp.dense_h_to_4h.bias": [(f,), True, False],
        "mlp.dense_4h_to_h.weight": [(h, f), True, False], "mlp.dense_4h_to_h.bias": [(h,), False, True],
    }
    for name, (shape, is_split, is_partial) in shapes.items():
        yield Parameter(f"transformer.layers.{number}.{name}", shape, is_split=is_split and has_tensor,
                        is_partial=is_partial and has_tensor, block=number)


def rank_parameters(rank: Rank) -> list[Parameter]:
    """The parameters of all stages of the rank."""
    return [parameter for stage in rank.stages for parameter in stage_parameters(rank, stage)]


class Unit(NamedTuple):
    """Parameters that are gathered together, of one `block` or of what is outside: their elements, rows evened out."""

    block: int | None
    padded_size: int


def sharded_units(rank: Rank, stage: Stage) -> Sequence[Unit]:
    """What is gathered together: each block, then what is outside the blocks."""
    return _sharded_units(_widths(rank), stage, rank.shards)


@cache
def _sharded_units(widths: Widths, stage: Stage, shards: int) -> tuple[Unit, ...]:
    parameters = _stage_parameters(widths, stage)
    sizes = {number: sum(p.padded(shards) for p in parameters if p.block == number) for number in (*stage.layers, None)}
    return tuple(Unit(number, size) for number, size in sizes.items() if size)
