"""From hidden states to logits over the vocabulary. Shapes: m tokens, h hidden, v vocabulary (padded)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.parallel.layers import LayerNorm, Linear


class MaskedLMHead(nn.Module):
    """Dense, exact GeLU, LayerNorm, then the word embedding's transpose (tied) and a bias, as in BERT."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.bias = nn.Parameter(torch.empty(padded_vocab_size))

    def forward(self, hidden_mh: Tensor, word_embeddings_vh: Tensor) -> Tensor:
        """Logits [m, v]."""
        hidden_mh = self.layernorm(F.gelu(self.dense(hidden_mh)))
        return F.linear(hidden_mh, word_embeddings_vh.to(hidden_mh.dtype), self.bias.to(hidden_mh.dtype))
