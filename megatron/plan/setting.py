"""Describes a part of the model to measure (`BlockRange`), and everything that its cost depends on (`Setting`)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch

from megatron.config import DataConfig, ModelConfig, PrecisionConfig
from megatron.data.batches.batch import Batch
from megatron.data.batches.typical import typical_batch
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.model.transformer import kind_of, num_taken, skips_of
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis, Mesh
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.amax_history import AmaxHistory
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.stream import Stream


@dataclass(frozen=True, eq=False)
class Setting:
    """Everything that the cost of a piece depends on.

    Only `setting_of` makes them, so that equal ones are the same object and cheap to compare. The axes have this rank's
    index and the size, without process groups. `is_gathered`: parameters are sharded, and gathered in the dtype of the
    matrix products.
    """

    model: ModelConfig
    precision: PrecisionConfig
    data: DataConfig
    num_rows: int
    padded_vocab_size: int
    tensor: Axis
    is_sequence_parallel: bool
    context: Axis
    is_gathered: bool

    @property
    def blocks_a_piece(self) -> int:
        """The number of blocks in a piece: those that are recomputed together, else 1."""
        return self.model.checkpoint_num_layers if self.model.checkpoint_activations else 1

    @cached_property
    def _kinds(self) -> Sequence[object]:
        return [kind_of(self.model, number) for number in range(self.model.num_layers)]

    def alike(self, blocks: range) -> range:
        """The first range of blocks in the model whose kinds are the same as those of `blocks`."""
        kinds, size = self._kinds, len(blocks)
        wanted = kinds[blocks.start:blocks.stop]
        starts = range(blocks.start) if size else ()
        start = next((start for start in starts if kinds[start:start + size] == wanted), blocks.start if size else 0)
        return range(start, start + size)

    def num_taken(self, blocks: range) -> int:
        """The number of skips from earlier blocks that these blocks take."""
        return num_taken(skips_of(self.model, number) for number in blocks)

    @cached_property
    def of_parameters(self) -> "Setting":
        """The same setting for parameters, which do not depend on rows, recomputation or gathering."""
        return self._with(num_rows=1, is_gathered=False).without_recomputation

    @cached_property
    def without_recomputation(self) -> "Setting":
        """The same setting without recomputation."""
        none: Any = None
        return self._with(model=replace(self.model, checkpoint_activations=False, recompute_granularity=none,
                                        distribute_checkpointed_activations=False))

    def _with(self, **changed: Any) -> "Setting":
        return setting_of(*(changed.get(item.name, getattr(self, item.name)) for item in fields(self)))

    @property
    def has_even_rows(self) -> bool:
        """Whether each row adds equally many tokens to every rank, so that cost is linear in the rows."""
        return self.data.seq_length % self.stream(Mesh(tensor=self.tensor, context=self.context)).token_multiple == 0

    def with_rows(self, num_rows: int) -> "Setting":
        """The same setting with another number of rows."""
        return self._with(num_rows=num_rows)

    @cached_property
    def batch(self) -> Batch:
        """A typical micro-batch, with this context rank's share of its tokens."""
        stream = self.stream(Mesh(tensor=self.tensor, context=self.context))
        return typical_batch(self.data, self.num_rows, stream.token_multiple, self.context.rank, self.context.size)

    def build(self, part: "BlockRange", mesh: Mesh, ends: Axis = ONE_RANK_AXIS) -> ProteinModel:
        """A part of the model as a pipeline stage on `meta`, with its copies for products and FP8 scales."""
        dtype = compute_dtype(self.precision)
        with torch.device("meta"):
            model = ProteinModel(self.model, self.precision, self.padded_vocab_size, self.stream(mesh), part.stage,
                                 ends, mask_id=0)
            if self.is_gathered:
                for parameter in model.parameters():
                    parameter.data = parameter.data.to(dtype)
            ComputeCopies(model.matrices(), dtype)
            with AmaxHistory([model], Mesh(device=torch.device("meta"))).of_step():
                pass  # the first step differs from the following ones
        return model

    def stream(self, mesh: Mesh) -> Stream:
        """How the residual stream is split over the ranks of `mesh`."""
        return Stream(mesh.tensor, self.is_sequence_parallel, mesh.context)


@cache
def setting_of(*values: Any) -> Setting:
    """The setting with these values, the same object each time; `values`: the fields of `Setting`, in order."""
    return Setting(*values)


class BlockRange(NamedTuple):
    """A part of the model: the blocks with these numbers and, if asked for, what comes before and after the blocks."""

    is_first: bool  # includes the embedding
    blocks: range
    is_last: bool  # includes the final normalisation, head and loss

    @property
    def stage(self) -> Stage:
        """A pipeline stage that consists of this part, in a model of as few stages as possible."""
        return Stage(0 if self.is_first else 1, 3 - self.is_first - self.is_last, self.blocks)
