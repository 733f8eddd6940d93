"""One rank of a layout: its place in the grid, its stages, its micro-batches."""

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
from megatron.plan.pieces import PieceMemory, measured
from megatron.plan.setting import BlockRange, Setting, setting_of


# A search asks for the same few stages thousands of times: they are made once, and known by their identity.
@dataclass(frozen=True, eq=False)
class PlannedStage:
    """A part of the model on a rank: its parameters, and its pieces in their order.

    `hidden_bytes`: of the hidden states of a micro-batch between two pieces, on this rank; `num_received` and
    `num_sent`: how many such tensors a message has that comes from the stage before, and that goes to the next one.
    `has_x0`: whether the embeddings pass on as well.
    """

    part: BlockRange
    held: Held
    pieces: tuple[PieceMemory, ...]
    hidden_bytes: int
    num_received: int
    num_sent: int
    has_x0: bool

    @property
    def received(self) -> int:
        """Bytes of a message that comes, and of its gradient."""
        return self.num_received * self.hidden_bytes

    @property
    def sent(self) -> int:
        """Bytes of a message that goes, and of its gradient."""
        return self.num_sent * self.hidden_bytes

    @cached_property
    def traffic(self) -> Traffic:
        """What the collectives of its passes send for a micro-batch."""
        traffic = Traffic()
        for piece in self.pieces:
            traffic.include(piece.traffic)
        return traffic

    @cached_property
    def flops(self) -> int:
        """Of its passes of a micro-batch, as `fp8_flops`, of these those in FP8, and `moved`, bytes through memory."""
        return sum(piece.flops for piece in self.pieces)

    @cached_property
    def fp8_flops(self) -> int:
        return sum(piece.fp8_flops for piece in self.pieces)

    @cached_property
    def moved(self) -> int:
        return sum(piece.moved for piece in self.pieces)


@dataclass(frozen=True)
class Rank:
    """Rank number `number` of `num_ranks` that train in the layout of `config`."""

    config: Config
    num_ranks: int
    number: int = 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis of the grid: pipeline, data, context and tensor."""
        return grid_sizes(self.config.parallel, self.num_ranks)

    @cached_property
    def place(self) -> dict[str, int]:
        """This rank's place along each axis; the last axis is the fastest."""
        return dict(zip(self.sizes, map(int, np.unravel_index(self.number, tuple(self.sizes.values()))), strict=True))

    @cached_property
    def replicas(self) -> int:
        """Ranks that hold the same parameters."""
        return self.sizes["data"] * self.sizes["context"]

    @cached_property
    def shards(self) -> int:
        """Of these, how many share them out."""
        parallel = self.config.parallel
        return 1 if parallel.data_parallel_sharding == "none" else parallel.shard_within or self.replicas

    @cached_property
    def sharding(self) -> str:
        """What is shared out; none where there is nobody to share with."""
        return self.config.parallel.data_parallel_sharding if self.shards > 1 else "none"

    @property
    def shard(self) -> int:
        """This rank's number among those that share out."""
        return self._replica % self.shards

    @property
    def holders(self) -> Axis:
        """All ranks that have parts of the same parameters."""
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
        """Micro-batches a step."""
        rows = self.config.training.micro_batch_size * self.sizes["data"]
        return (self.config.training.global_batch_size or rows) // rows

    @property
    def puts_off(self) -> bool:
        """Whether weights' gradients are computed later than their backward passes."""
        return self.config.parallel.pipeline_schedule == "zero-bubble"

    @cached_property
    def setting(self) -> Setting:
        """All that the pieces of the model depend on."""
        config = self.config
        return setting_of(config.model, config.precision, config.data, config.training.micro_batch_size,
                          padded_vocab_size(config), self._axis("tensor"), config.parallel.sequence_parallel,
                          self._axis("context"), self.sharding != "none" and self.width < 4)

    @property
    def width(self) -> int:
        """Bytes of an element of what is gathered."""
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
    """The first part of the model that is as this one, and how many tensors this one receives and sends."""
    blocks, model = part.blocks, setting.model
    return (part._replace(blocks=setting.alike(blocks)), 0 if part.is_first else num_passing(model, blocks.start),
            0 if part.is_last else num_passing(model, blocks.stop))


@cache
def _planned(setting: Setting, part: BlockRange, num_received: int, num_sent: int, has_pipeline: bool,
             puts_off: bool) -> PlannedStage:
    size, blocks = setting.blocks_a_piece, part.blocks
    groups = [blocks[start:start + size] for start in range(0, len(blocks), size)]
    parts = [BlockRange(True, range(0), False)] * part.is_first + [BlockRange(False, group, False) for group in groups]
    parts += [BlockRange(False, range(0), True)] * part.is_last
    pieces = tuple(measured(setting, one, puts_off) for one in parts)
    held = held_by(setting.of_parameters, part, has_pipeline)
    return PlannedStage(part, held, pieces, measured(setting, BlockRange(False, range(1), False), puts_off).input,
                        num_received, num_sent, setting.model.x0_skips)


def padded_vocab_size(config: Config) -> int:
    """Ids of the vocabulary, padded as on one rank."""
    vocab = _vocab(config.data.vocab_file, config.data.mask_token)
    return vocab.padded_size(config.model)


@cache
def _vocab(name: str | None, mask_token: str | None) -> Vocab:
    return Vocab.from_file(name, mask_token)
