"""One rank of a layout: its place in the grid of ranks, its stages, its micro-batches."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megatron.config import Config, ParallelConfig
from megatron.data.corpus.vocab import Vocab
from megatron.model.protein_model import compute_dtype
from megatron.model.transformer import num_passing
from megatron.parallel.mesh import Axis, grid_sizes
from megatron.parallel.pipeline.partition import stages_of_rank
from megatron.parallel.traffic import Traffic
from megatron.plan.parameters import Held, held_by, together
from megatron.plan.pieces import PieceCost, measured
from megatron.plan.setting import BlockRange, Setting, setting_of


# Compared by identity, since a search uses the same few cached stages thousands of times.
@dataclass(frozen=True, eq=False)
class PlannedStage:
    """A pipeline stage on a rank: its parameters, and its pieces in order."""

    part: BlockRange
    held: Held
    pieces: tuple[PieceCost, ...]
    hidden_bytes: int  # of a micro-batch's hidden states between two pieces, on this rank
    num_received: int  # how many such tensors are in a message from the stage before
    num_sent: int  # and in one to the next stage
    has_x0: bool  # whether the embeddings are passed on too

    @property
    def received(self) -> int:
        """Bytes of a message from the stage before; its gradient has as many."""
        return self.num_received * self.hidden_bytes

    @property
    def sent(self) -> int:
        """Bytes of a message to the next stage; its gradient has as many."""
        return self.num_sent * self.hidden_bytes

    @cached_property
    def traffic(self) -> Traffic:
        """What the collectives in its forward and backward pass send for a micro-batch."""
        traffic = Traffic()
        for piece in self.pieces:
            traffic.include(piece.traffic)
        return traffic

    @cached_property
    def flops(self) -> int:
        """FLOPs of the forward and backward pass of a micro-batch."""
        return sum(piece.flops for piece in self.pieces)

    @cached_property
    def fp8_flops(self) -> int:
        """Those of `flops` that are in FP8."""
        return sum(piece.fp8_flops for piece in self.pieces)

    @cached_property
    def moved(self) -> int:
        """Bytes that these passes read and write in memory."""
        return sum(piece.moved for piece in self.pieces)


@dataclass(frozen=True)
class Rank:
    """Rank number `number` of `num_ranks` that train in the layout of `config`."""

    config: Config
    num_ranks: int
    number: int = 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of ranks along each axis of the grid: pipeline, data, context and tensor."""
        return grid_sizes(self.config.parallel, self.num_ranks)

    @cached_property
    def place(self) -> dict[str, int]:
        """This rank's index along each axis; neighbours along the last axis have consecutive numbers."""
        return dict(zip(self.sizes, map(int, np.unravel_index(self.number, tuple(self.sizes.values()))), strict=True))

    @cached_property
    def replicas(self) -> int:
        """The number of ranks that hold the same parameters, or shares of them."""
        return self.sizes["data"] * self.sizes["context"]

    @cached_property
    def shards(self) -> int:
        """The number of ranks, of these, that a parameter is sharded over."""
        parallel = self.config.parallel
        return 1 if parallel.data_parallel_sharding == "none" else parallel.shard_within or self.replicas

    @cached_property
    def sharding(self) -> str:
        """The value of --data-parallel-sharding; "none" if there is only one shard."""
        return self.config.parallel.data_parallel_sharding if self.shards > 1 else "none"

    @property
    def shard(self) -> int:
        """This rank's index among the shards."""
        return self._replica % self.shards

    @property
    def holders(self) -> Axis:
        """The axis of all ranks that hold parts of the same parameters."""
        tensor = self.sizes["tensor"]
        return Axis(self._replica * tensor + self.place["tensor"], self.replicas * tensor)

    @property
    def _replica(self) -> int:
        return self.place["data"] * self.sizes["context"] + self.place["context"]

    @cached_property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The stages of this pipeline rank."""
        parts = _parts(self.config.model.num_layers, self.config.parallel, self.place["pipeline"])
        return tuple(_planned(self.setting, *_alike(self.setting, part), self.sizes["pipeline"] > 1, self.puts_off)
                     for part in parts)

    @cached_property
    def held(self) -> Held:
        """The parameters of all stages."""
        return together(tuple(stage.held for stage in self.stages))

    @cached_property
    def num_micro_batches(self) -> int:
        """The number of micro-batches of a step."""
        rows = self.config.training.micro_batch_size * self.sizes["data"]
        return (self.config.training.global_batch_size or rows) // rows

    @property
    def puts_off(self) -> bool:
        """Whether weight gradients are computed after the backward passes (zero-bubble)."""
        return self.config.parallel.pipeline_schedule == "zero-bubble"

    @cached_property
    def setting(self) -> Setting:
        """Everything that the cost of the model's pieces depends on."""
        config = self.config
        return setting_of(config.model, config.precision, config.data, config.training.micro_batch_size,
                          padded_vocab_size(config), self._axis("tensor"), config.parallel.sequence_parallel,
                          self._axis("context"), self.sharding != "none" and self.width < 4)

    @property
    def width(self) -> int:
        """Bytes of an element of gathered parameters."""
        return compute_dtype(self.config.precision).itemsize

    def _axis(self, name: str) -> Axis:
        return Axis(self.place[name], self.sizes[name])


@cache
def _parts(num_layers: int, parallel: ParallelConfig, place: int) -> list[BlockRange]:
    """The stages of a pipeline rank."""
    return [BlockRange(stage.is_first, stage.layers, stage.is_last)
            for stage in stages_of_rank(num_layers, parallel, place)]


@cache
def _alike(setting: Setting, part: BlockRange) -> tuple[BlockRange, int, int]:
    """The first part of the model whose blocks are of the same kinds, and how many tensors `part` receives and sends.

    Stages that agree in these share a cached `PlannedStage`.
    """
    blocks, model = part.blocks, setting.model
    return (part._replace(blocks=setting.alike(blocks)), 0 if part.is_first else num_passing(model, blocks.start),
            0 if part.is_last else num_passing(model, blocks.stop))


@cache
def _planned(setting: Setting, part: BlockRange, num_received: int, num_sent: int, has_pipeline: bool,
             puts_off: bool) -> PlannedStage:
    """A stage, with its pieces measured."""
    size, blocks = setting.blocks_a_piece, part.blocks
    groups = [blocks[start:start + size] for start in range(0, len(blocks), size)]
    parts = [BlockRange(True, range(0), False)] * part.is_first + [BlockRange(False, group, False) for group in groups]
    parts += [BlockRange(False, range(0), True)] * part.is_last
    pieces = tuple(measured(setting, one, puts_off) for one in parts)
    held = held_by(setting.of_parameters, part, has_pipeline)
    return PlannedStage(part, held, pieces, measured(setting, BlockRange(False, range(1), False), puts_off).input,
                        num_received, num_sent, setting.model.x0_skips)


def padded_vocab_size(config: Config) -> int:
    """The size of the vocabulary, padded as for one tensor rank."""
    vocab = _vocab(config.data.vocab_file, config.data.mask_token)
    return vocab.padded_size(config.model)


@cache
def _vocab(name: str | None, mask_token: str | None) -> Vocab:
    return Vocab.from_file(name, mask_token)
