"""From token ids to the residual stream. Shapes: t tokens, h hidden, v vocabulary (padded)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig


class Embedding(nn.Module):
    """The sum of a word and a learned position embedding, with dropout."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.word_embeddings = Table(padded_vocab_size, config.hidden_size)
        self.position_embeddings = Table(config.max_position_embeddings, config.hidden_size)
        self.dropout, self.dtype = config.hidden_dropout, dtype

    def forward(self, tokens_t: Tensor, positions_t: Tensor) -> Tensor:
        """[t, h] from token ids and from positions that restart at 0 with each protein."""
        hidden_th = self.word_embeddings(tokens_t) + self.position_embeddings(positions_t)
        return F.dropout(hidden_th.to(self.dtype), self.dropout, self.training)


class Table(nn.Module):
    """A row of `weight` [num_rows, h] for each id."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))

    def forward(self, ids_t: Tensor) -> Tensor:
        """[t, h]."""
        return F.embedding(ids_t, self.weight)
