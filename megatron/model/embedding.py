"""From token ids to the residual stream. Shapes: t tokens, u of them in this rank's stream, g proteins, h hidden."""

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.kernels.dropout import Use
from megatron.kernels.packed_sequence import PackedSequence, proteins_of_tokens
from megatron.model.initialisation import normal
from megatron.model.normalisation import Norm
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.randomness import dropout_of
from megatron.parallel.tensor.layers import EmbeddingTable
from megatron.parallel.tensor.stream import Stream
from megatron.parallel.tensor.vocabulary import VocabularyParallelTable

ESM_MASKED_SHARE = 0.15 * 0.8  # of residues that read [MASK] in ESM's training: a constant of its models


class Embedding(nn.Module):
    """Word embeddings, plus position embeddings if positions are learned; then optionally a norm, and dropout.

    `ends`: the first and last pipeline rank where both hold the word embeddings. `mask_id`: the id of [MASK], for
    `--token-dropout`.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, dtype: torch.dtype, stream: Stream,
                 ends: Axis = ONE_RANK_AXIS, mask_id: int | None = None) -> None:
        super().__init__()
        self.stream = stream
        self.word_embeddings = _word_embeddings(config, padded_vocab_size, stream, ends)
        self.has_positions = config.position_embedding_type == "learned_absolute"
        if self.has_positions:
            self.position_embeddings = EmbeddingTable(config.max_position_embeddings, config.hidden_size, stream,
                                                      normal(config))
        self.layernorm = Norm(config, stream) if config.embedding_layernorm else None
        self.dropout, self.dtype = config.hidden_dropout, dtype
        self.mask_id = mask_id if config.token_dropout else None
        assert self.mask_id is not None or not config.token_dropout, "token dropout knows the mask"

    def forward(self, sequence: PackedSequence) -> Tensor:
        """[u, h]; positions restart at 0 with each protein."""
        hidden_uh = self.word_embeddings(sequence.tokens_t)
        if self.mask_id is not None:
            scales_t = token_dropout_scales(sequence, self.mask_id, self.stream.context)
            hidden_uh = hidden_uh * self.stream.tokens(scales_t)[:, None]
        if self.has_positions:
            hidden_uh = hidden_uh + self.position_embeddings(self.stream.tokens(sequence.positions_t))
        if self.layernorm is not None:
            hidden_uh = self.layernorm(hidden_uh)
        return self.stream.dropout(hidden_uh.to(self.dtype), dropout_of(self, sequence, Use.EMBEDDINGS))


class TiedEmbedding(nn.Module):
    """The word embeddings alone, on a last pipeline stage whose tied head needs them for its logits."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream, ends: Axis = ONE_RANK_AXIS) -> None:
        super().__init__()
        self.word_embeddings = _word_embeddings(config, padded_vocab_size, stream, ends)


def token_dropout_scales(sequence: PackedSequence, mask_id: int, context: Axis) -> Tensor:
    """The factors of the tokens' embeddings, fp32 [t]: 0 for a masked token, else (1 - 0.12) / (1 - m).

    m: the masked share of the protein's tokens, special tokens included. So the sum of embeddings does not depend on
    how much is masked: ESM's token dropout (Rives et al., 2021, appendix; fair-esm's `esm/model/esm2.py`). Forward: the
    counts are all-reduced over the context ranks, which hold the proteins' other tokens.
    """
    is_masked_t, ends = sequence.tokens_t == mask_id, sequence.cu_seqlens
    start = context.rank * len(is_masked_t)
    protein_t = proteins_of_tokens(ends, start, start + len(is_masked_t))
    num_masked_g = torch.zeros(len(ends) - 1, device=ends.device).index_add(0, protein_t, is_masked_t.float())
    num_masked_g = all_reduce_sum(num_masked_g, context)
    scales_g = (1 - ESM_MASKED_SHARE) * ends.diff() / (ends.diff() - num_masked_g)  # where nothing is seen, not used
    return scales_g[protein_t].masked_fill(is_masked_t, 0)


def _word_embeddings(config: ModelConfig, padded_vocab_size: int, stream: Stream,
                     ends: Axis) -> VocabularyParallelTable:
    return VocabularyParallelTable(padded_vocab_size, config.hidden_size, config.make_vocab_size_divisible_by, stream,
                                   normal(config), ends)
