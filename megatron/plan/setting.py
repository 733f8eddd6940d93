"""Which part of the model is measured, and all that it depends on."""

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
    """What a piece depends on, made by `setting_of` alone: there are no two alike, and comparing them costs nothing.

    The axes are this rank's places on them, without groups; `is_gathered`: parameters are others', in the dtype of the
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
        """Blocks of which one input is kept, or 1."""
        return self.model.checkpoint_num_layers if self.model.checkpoint_activations else 1

    @cached_property
    def _kinds(self) -> Sequence[object]:
        return [kind_of(self.model, number) for number in range(self.model.num_layers)]

    def alike(self, blocks: range) -> range:
        """The first blocks of the model that are each of the same kind."""
        kinds, size = self._kinds, len(blocks)
        wanted = kinds[blocks.start:blocks.stop]
        starts = range(blocks.start) if size else ()
        start = next((start for start in starts if kinds[start:start + size] == wanted), blocks.start if size else 0)
        return range(start, start + size)

    def num_taken(self, blocks: range) -> int:
        """How many skips that come to these blocks they take; the others pass them by."""
        return num_taken(skips_of(self.model, number) for number in blocks)

    @cached_property
    def of_parameters(self) -> "Setting":
        """One for all numbers of rows and all recomputation, on which parameters do not depend."""
        return self._with(num_rows=1, is_gathered=False).without_recomputation

    @cached_property
    def without_recomputation(self) -> "Setting":
        """The same, but that everything is kept."""
        none: Any = None
        return self._with(model=replace(self.model, checkpoint_activations=False, recompute_granularity=none,
                                        distribute_checkpointed_activations=False))

    def _with(self, **changed: Any) -> "Setting":
        return setting_of(*(changed.get(item.name, getattr(self, item.name)) for item in fields(self)))

    @property
    def has_even_rows(self) -> bool:
        """Whether each row adds as many tokens to each rank."""
        return self.data.seq_length % self.stream(Mesh(tensor=self.tensor, context=self.context)).token_multiple == 0

    def with_rows(self, num_rows: int) -> "Setting":
        """The same, but for the number of rows."""
        return self._with(num_rows=num_rows)

    @property
    def batch(self) -> Batch:
        """The micro-batch, of its tokens those of this context rank."""
        return _batch(self.data, self.num_rows, self.stream(Mesh(tensor=self.tensor, context=self.context)))

    def build(self, part: "BlockRange", mesh: Mesh, ends: Axis = ONE_RANK_AXIS) -> ProteinModel:
        """The part of the model on `meta`, as the pipeline stage that it can be, with copies and scales."""
        dtype = compute_dtype(self.precision)
        with torch.device("meta"):
            model = ProteinModel(self.model, self.precision, self.padded_vocab_size, self.stream(mesh), part.stage,
                                 ends, mask_id=0)
            if self.is_gathered:
                for parameter in model.parameters():
                    parameter.data = parameter.data.to(dtype)
            ComputeCopies(model.matrices(), dtype)
            with AmaxHistory([model], Mesh(device=torch.device("meta"))).of_step():
                pass  # the first step is another than those that follow
        return model

    def stream(self, mesh: Mesh) -> Stream:
        """Where the tokens of the residual stream lie."""
        return Stream(mesh.tensor, self.is_sequence_parallel, mesh.context)


@cache
def setting_of(*values: Any) -> Setting:
    """The setting with these values."""
    return Setting(*values)


class BlockRange(NamedTuple):
    """The blocks of these numbers, with what comes before the first and behind the last one or without."""

    is_first: bool
    blocks: range
    is_last: bool

    @property
    def stage(self) -> Stage:
        """A stage that is this part, of as few as there can be."""
        return Stage(0 if self.is_first else 1, 3 - self.is_first - self.is_last, self.blocks)


@cache
def _batch(data: DataConfig, num_rows: int, stream: Stream) -> Batch:
    return typical_batch(data, num_rows, stream.token_multiple, stream.context.rank, stream.context.size)
