"""From token ids to the residual stream. Shapes: t tokens, u tokens of the stream on this rank, h hidden."""

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.parallel.randomness import rate_of
from megatron.parallel.tensor.layers import Table
from megatron.parallel.tensor.stream import Stream
from megatron.parallel.tensor.vocabulary import VocabularyParallelTable


class Embedding(nn.Module):
    """The sum of a word and a learned position embedding, with dropout."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, dtype: torch.dtype, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.word_embeddings = VocabularyParallelTable(padded_vocab_size, config.hidden_size,
                                                       config.make_vocab_size_divisible_by, stream)
        self.position_embeddings = Table(config.max_position_embeddings, config.hidden_size, stream)
        self.dropout, self.dtype = config.hidden_dropout, dtype

    def forward(self, tokens_t: Tensor, positions_t: Tensor) -> Tensor:
        """[u, h] from token ids and from positions that restart at 0 with each protein."""
        hidden_uh = self.word_embeddings(tokens_t) + self.position_embeddings(self.stream.tokens(positions_t))
        return self.stream.dropout(hidden_uh.to(self.dtype), rate_of(self))


class TiedEmbedding(nn.Module):
    """The word embedding alone, where the last pipeline stage needs it for its logits."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream) -> None:
        super().__init__()
        self.word_embeddings = VocabularyParallelTable(padded_vocab_size, config.hidden_size,
                                                       config.make_vocab_size_divisible_by, stream)
