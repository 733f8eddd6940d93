"""One rank of a layout in numbers: the sizes of its parts of the tensors, its stages, its micro-batches.

The letters of the formulas: t tokens of a micro-batch on this context rank, u of them in this rank's residual stream,
m targets among them, h hidden, n local heads, d head width, f local feed-forward width, v vocabulary of this rank.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megatron.config import Config
from megatron.data.batches.typical import typical_lengths, typical_targets
from megatron.data.corpus.vocab import DEFAULT_VOCAB, Vocab
from megatron.parallel.mesh import grid_sizes
from megatron.parallel.pipeline.partition import Stage, stages_of_rank


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
        place, rest = {}, self.number
        for axis, size in reversed(self.sizes.items()):
            rest, place[axis] = divmod(rest, size)
        return place

    @cached_property
    def replicas(self) -> int:
        """Ranks that hold the same parameters."""
        return self.sizes["data"] * self.sizes["context"]

    @cached_property
    def shards(self) -> int:
        """Of these, how many share them out."""
        parallel = self.config.parallel
        return 1 if parallel.data_parallel_sharding == "none" else parallel.shard_within or self.replicas

    @property
    def sharding(self) -> str:
        """What is shared out; none where there is nobody to share with."""
        return self.config.parallel.data_parallel_sharding if self.shards > 1 else "none"

    @property
    def shard(self) -> int:
        """This rank's number among those that share out."""
        return (self.place["data"] * self.sizes["context"] + self.place["context"]) % self.shards

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages of this pipeline rank."""
        return stages_of_rank(self.config.model.num_layers, self.config.parallel, self.place["pipeline"])

    @cached_property
    def num_micro_batches(self) -> int:
        """Micro-batches a step."""
        rows = self.config.training.micro_batch_size * self.sizes["data"]
        return (self.config.training.global_batch_size or rows) // rows

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether the stream's tokens are shared out over the tensor axis."""
        return self.config.parallel.sequence_parallel

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each protein of a micro-batch; the last evens the number of tokens out."""
        lengths = typical_lengths(self.config.data.seq_length, self.config.training.micro_batch_size)
        multiple = self.sizes["context"] * (self.sizes["tensor"] if self.is_sequence_parallel else 1)
        missing = -sum(lengths) % multiple
        return (*lengths, missing) if missing else lengths

    @cached_property
    def t(self) -> int:
        """Tokens of a micro-batch on this context rank."""
        return sum(self.lengths) // self.sizes["context"]

    @cached_property
    def u(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.t // self.sizes["tensor"] if self.is_sequence_parallel else self.t

    @cached_property
    def m(self) -> int:
        """Targets on this context rank."""
        targets = typical_targets(self.config.data, self.config.training.micro_batch_size)
        start = self.place["context"] * self.t
        first, last = np.searchsorted(targets, (start, start + self.t)).tolist()
        return last - first

    @property
    def h(self) -> int:
        """Width of the stream."""
        return self.config.model.hidden_size

    @cached_property
    def nd(self) -> int:
        """Heads of this rank times their width."""
        model = self.config.model
        return model.num_attention_heads * model.kv_channels // self.sizes["tensor"]

    @cached_property
    def n(self) -> int:
        """Heads of this rank."""
        return self.config.model.num_attention_heads // self.sizes["tensor"]

    @cached_property
    def f(self) -> int:
        """Feed-forward width of this rank."""
        return self.config.model.ffn_hidden_size // self.sizes["tensor"]

    @cached_property
    def vocab_size(self) -> int:
        """Ids, padded as on one rank."""
        return padded_vocab_size(self.config)

    @cached_property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary that each tensor rank holds."""
        multiple = self.config.model.make_vocab_size_divisible_by
        return -(-self.vocab_size // (multiple * self.sizes["tensor"])) * multiple

    @cached_property
    def v(self) -> int:
        """Rows on this rank that stand for ids."""
        return min(max(self.vocab_size - self.place["tensor"] * self.vocab_rows, 0), self.vocab_rows)

    @property
    def is_half(self) -> bool:
        """Whether activations are in half precision."""
        return self.config.precision.fp16 or self.config.precision.bf16

    @property
    def e(self) -> int:
        """Bytes of an activation."""
        return 2 if self.is_half else 4

    @property
    def r(self) -> int:
        """Bytes of an element of the residual stream."""
        return 4 if self.config.model.fp32_residual_connection else self.e

    @property
    def takes_flash(self) -> bool:
        """Whether attention takes the GPU's fused operator, as `megatron.kernels.attention` decides."""
        width = self.config.model.kv_channels
        return self.is_half and width % 8 == 0 and width <= 256


def padded_vocab_size(config: Config) -> int:
    """Ids of the vocabulary, padded as on one rank."""
    return _vocab(config.data.vocab_file).padded_size(config.model.make_vocab_size_divisible_by)


@cache
def _vocab(path: str | None) -> Vocab:
    return Vocab.from_file(path or DEFAULT_VOCAB)
