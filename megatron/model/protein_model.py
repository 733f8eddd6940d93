"""The masked language model: embedding, transformer, head, and its loss.

Shapes: t flat tokens of the packed proteins, u of them in the residual stream of this rank (all, but for sequence
parallelism), m targets among them, h hidden, v vocabulary (padded) on this rank.
"""

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig, PrecisionConfig
from megatron.kernels.attention import Boundaries
from megatron.model.embedding import Embedding
from megatron.model.head import MaskedLMHead
from megatron.model.transformer import Transformer
from megatron.parallel.stream import ONE_RANK, Stream
from megatron.parallel.vocabulary import vocabulary_cross_entropy


class ProteinModel(nn.Module):
    """A BERT-like model that reads many proteins in one line of tokens.

    Parameters are fp32 and named as in Megatron-LM's checkpoints; activations are in the dtype of `precision`.
    `padded_vocab_size` is that of one rank; `stream` says how layers and tokens are split over the tensor axis.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, padded_vocab_size: int,
                 stream: Stream = ONE_RANK) -> None:
        super().__init__()
        self.stream = stream
        dtype = compute_dtype(precision)
        stream_dtype = torch.float32 if config.fp32_residual_connection else dtype
        self.embedding = Embedding(config, padded_vocab_size, stream_dtype, stream)
        self.transformer = Transformer(config, dtype, stream)
        self.lm_head = MaskedLMHead(config, padded_vocab_size, stream)
        self.loss_in_fp32 = not precision.fp16_lm_cross_entropy

    def forward(self, tokens_t: Tensor, positions_t: Tensor, boundaries: Boundaries, target_positions_m: Tensor,
                target_ids_m: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross entropy of the targets (nats, fp32) and how many of them are the most likely token."""
        hidden_uh = self.hidden(tokens_t, positions_t, boundaries)
        logits_mv = self.logits(self.stream.pick(hidden_uh, target_positions_m))
        if self.loss_in_fp32:
            logits_mv = logits_mv.float()
        return vocabulary_cross_entropy(logits_mv, target_ids_m, len(self.lm_head.bias), self.stream.axis)

    def hidden(self, tokens_t: Tensor, positions_t: Tensor, boundaries: Boundaries) -> Tensor:
        """Hidden states [u, h] after the last LayerNorm."""
        tokens_t, positions_t, boundaries = _evened(tokens_t, positions_t, boundaries, self.stream.token_multiple)
        return self.transformer(self.embedding(tokens_t, positions_t), boundaries)

    def logits(self, hidden_mh: Tensor) -> Tensor:
        """Logits [m, v] of hidden states."""
        return self.lm_head(hidden_mh, self.embedding.word_embeddings.weight)


def _evened(tokens_t: Tensor, positions_t: Tensor, boundaries: Boundaries,
            multiple: int) -> tuple[Tensor, Tensor, Boundaries]:
    """The same tokens, and behind them what is missing to a multiple of `multiple`, as one more protein.

    No other protein sees it and it has no targets, so that nothing else changes; its ids are any.
    """
    missing = -len(tokens_t) % multiple
    if missing == 0:
        return tokens_t, positions_t, boundaries
    ends = torch.cat([boundaries.cu_seqlens, boundaries.cu_seqlens[-1:] + missing])
    return (torch.cat([tokens_t, tokens_t.new_zeros(missing)]),
            torch.cat([positions_t, torch.arange(missing, device=positions_t.device)]),
            Boundaries(ends, (*boundaries.lengths, missing)))


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The dtype of activations."""
    if precision.fp16:
        return torch.float16
    return torch.bfloat16 if precision.bf16 else torch.float32
