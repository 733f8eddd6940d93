"""From token ids to the residual stream. Shapes: t tokens, u tokens of the stream on this rank, h hidden."""

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.initialisation import normal
from megatron.parallel.mesh import Axis
from megatron.parallel.randomness import rate_of
from megatron.parallel.tensor.layers import Table
from megatron.parallel.tensor.stream import Stream
from megatron.parallel.tensor.vocabulary import VocabularyParallelTable

_ONE_RANK = Axis()


class Embedding(nn.Module):
    """The sum of a word and a learned position embedding, with dropout; `ends`: the pipeline ranks with its words."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, dtype: torch.dtype, stream: Stream,
                 ends: Axis = _ONE_RANK) -> None:
        super().__init__()
        self.stream = stream
        self.word_embeddings = _word_embeddings(config, padded_vocab_size, stream, ends)
        self.position_embeddings = Table(config.max_position_embeddings, config.hidden_size, stream, normal(config))
        self.dropout, self.dtype = config.hidden_dropout, dtype

    def forward(self, tokens_t: Tensor, positions_t: Tensor) -> Tensor:
        """[u, h] from token ids and from positions that restart at 0 with each protein."""
        hidden_uh = self.word_embeddings(tokens_t) + self.position_embeddings(self.stream.tokens(positions_t))
        return self.stream.dropout(hidden_uh.to(self.dtype), rate_of(self))


class TiedEmbedding(nn.Module):
    """The word embedding alone, where the last pipeline stage needs it for its logits."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream, ends: Axis = _ONE_RANK) -> None:
        super().__init__()
        self.word_embeddings = _word_embeddings(config, padded_vocab_size, stream, ends)


def _word_embeddings(config: ModelConfig, padded_vocab_size: int, stream: Stream,
                     ends: Axis) -> VocabularyParallelTable:
    return VocabularyParallelTable(padded_vocab_size, config.hidden_size, config.make_vocab_size_divisible_by, stream,
                                   normal(config), ends)
