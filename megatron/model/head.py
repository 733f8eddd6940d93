"""From hidden states to logits over the vocabulary. Shapes: m tokens, h hidden, r rows and v ids of this rank."""

from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.model.initialisation import normal
from megatron.parallel.parameters import Constant, Declaration
from megatron.parallel.tensor.layers import LayerNorm, Linear, Matrix
from megatron.parallel.tensor.stream import ONE_RANK, Stream
from megatron.parallel.tensor.vocabulary import vocabulary_logits, vocabulary_parameter


class MaskedLMHead(nn.Module):
    """Dense, exact GeLU, LayerNorm, then the word embedding's transpose (tied) and a bias, as in BERT.

    Up to the LayerNorm every tensor rank computes alike; the vocabulary is split.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, normal(config))
        self.layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon, ONE_RANK)
        self.num_ids, self.axis = padded_vocab_size, stream.axis
        self.bias = vocabulary_parameter((padded_vocab_size,), config.make_vocab_size_divisible_by, stream.axis,
                                         Declaration(Constant(0.0), "head", decays=False))

    def forward(self, hidden_mh: Tensor, word_embeddings: Matrix) -> Tensor:
        """Logits [m, v]; every rank gives the same hidden states."""
        hidden_mh = self.layernorm(F.gelu(self.dense(hidden_mh)))
        return vocabulary_logits(hidden_mh, word_embeddings, self.bias, self.num_ids, self.axis)
