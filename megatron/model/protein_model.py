"""The masked language model: embedding, transformer, head, and its loss.

Shapes: t flat tokens of the packed proteins, m targets among them, h hidden, v vocabulary (padded).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig, PrecisionConfig
from megatron.kernels.attention import Boundaries
from megatron.model.embedding import Embedding
from megatron.model.head import MaskedLMHead
from megatron.model.transformer import Transformer


class ProteinModel(nn.Module):
    """A BERT-like model that reads many proteins in one line of tokens.

    Parameters are fp32 and named as in Megatron-LM's checkpoints; activations are in the dtype of `precision`.
    """

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, padded_vocab_size: int) -> None:
        super().__init__()
        dtype = compute_dtype(precision)
        stream_dtype = torch.float32 if config.fp32_residual_connection else dtype
        self.embedding = Embedding(config, padded_vocab_size, stream_dtype)
        self.transformer = Transformer(config, dtype)
        self.lm_head = MaskedLMHead(config, padded_vocab_size)
        self.loss_in_fp32 = not precision.fp16_lm_cross_entropy

    def forward(self, tokens_t: Tensor, positions_t: Tensor, boundaries: Boundaries, target_positions_m: Tensor,
                target_ids_m: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross entropy of the targets (nats, fp32) and how many of them are the most likely token."""
        hidden_th = self.hidden(tokens_t, positions_t, boundaries)
        logits_mv = self.logits(hidden_th.index_select(0, target_positions_m))
        if self.loss_in_fp32:
            logits_mv = logits_mv.float()
        loss = F.cross_entropy(logits_mv, target_ids_m, reduction="sum").float()
        return loss, (logits_mv.detach().argmax(-1) == target_ids_m).sum()

    def hidden(self, tokens_t: Tensor, positions_t: Tensor, boundaries: Boundaries) -> Tensor:
        """Hidden states [t, h] after the last LayerNorm."""
        return self.transformer(self.embedding(tokens_t, positions_t), boundaries)

    def logits(self, hidden_mh: Tensor) -> Tensor:
        """Logits [m, v] of hidden states."""
        return self.lm_head(hidden_mh, self.embedding.word_embeddings.weight)


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The dtype of activations."""
    if precision.fp16:
        return torch.float16
    return torch.bfloat16 if precision.bf16 else torch.float32
