"""The heads: from hidden states to logits over the vocabulary, and from attention maps to contacts.

Shapes: m targets, h hidden, r rows of the vocabulary on this rank and v ids among them (others are padding).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.kernels.cross_entropy import softcapped
from megatron.model.initialisation import normal
from megatron.model.normalisation import Norm
from megatron.parallel.parameters import Constant, Declaration, whole_parameter
from megatron.parallel.tensor.layers import Linear, Matrix
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.parallel.tensor.vocabulary import vocabulary_logits, vocabulary_loss, vocabulary_parameter


class MaskedLMHead(nn.Module):
    """Dense, exact GeLU, norm, then the product with the transposed word embeddings and a bias, as in BERT.

    An untied head uses a matrix of its own, `decoder`, instead of the word embeddings. Every tensor rank computes the
    same up to the norm; after it the vocabulary is split. With `--final-logit-softcapping` c a logit x becomes
    c·tanh(x / c) (Gemma 2, arXiv 2408.00118).
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream,
                 loss_in_fp32: bool = True) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, normal(config), not config.disable_bias_linear)
        self.layernorm = Norm(config, ONE_RANK_STREAM)
        self.num_ids, self.axis = padded_vocab_size, stream.axis
        is_untied = config.untie_embeddings_and_output_weights
        self.decoder = Decoder(config, padded_vocab_size, stream) if is_untied else None
        self.bias = vocabulary_parameter((padded_vocab_size,), config.make_vocab_size_divisible_by, stream.axis,
                                         Declaration(Constant(0.0), "head", decays=False))
        self.softcap, self.loss_in_fp32 = config.final_logit_softcapping, loss_in_fp32

    def forward(self, hidden_mh: Tensor, word_embeddings: Matrix | None) -> Tensor:
        """This rank's logits [m, v], from hidden states that are the same on every tensor rank.

        `word_embeddings`: used by a tied head alone.
        """
        matrix = self._matrix(word_embeddings)
        logits_mv = vocabulary_logits(self._features(hidden_mh), matrix, self.bias, self.num_ids, self.axis)
        return softcapped(logits_mv, self.softcap)

    def loss(self, hidden_mh: Tensor, word_embeddings: Matrix | None, target_ids_m: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross entropy (nats, fp32) of the targets, and how many are the most likely id.

        The logits of all targets are never in memory at once.
        """
        return vocabulary_loss(self._features(hidden_mh), self._matrix(word_embeddings), self.bias, target_ids_m,
                               self.num_ids, self.axis, self.softcap,
                               torch.float32 if self.loss_in_fp32 else hidden_mh.dtype)

    def _features(self, hidden_mh: Tensor) -> Tensor:
        """The features [m, h] that are multiplied with the vocabulary's matrix."""
        return self.layernorm(F.gelu(self.dense(hidden_mh)))

    def _matrix(self, word_embeddings: Matrix | None) -> Matrix:
        matrix = self.decoder or word_embeddings
        assert matrix is not None, "a tied head gets the word embeddings"
        return matrix


class Decoder(Matrix):
    """The vocabulary's matrix of an untied head: a row for each id, split over the tensor axis."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream) -> None:
        super().__init__()
        self.weight = vocabulary_parameter((padded_vocab_size, config.hidden_size), config.make_vocab_size_divisible_by,
                                           stream.axis, Declaration(normal(config), "head", decays=True))


class ContactHead(nn.Module):
    """ESM's logistic regression from attention maps to contacts (Rao et al., 2021, bioRxiv 2020.12.15.422761).

    It has a weight for each head of each block. They were fitted on structures, so pretraining does not change them: a
    checkpoint that is loaded with them is saved with them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        untrained = Declaration(Constant(0.0), "head", decays=False, is_trained=False)
        self.weight = whole_parameter((1, config.num_layers * config.num_attention_heads), untrained)
        self.bias = whole_parameter((1,), untrained)

    def forward(self, map_nrr: Tensor, first: int) -> Tensor:
        """The contribution of n heads to the logits [r, r], without the bias, from their maps among r residues.

        `first`: the number of the first of these heads, counted through all blocks. For each head: its map plus the
        transpose, S, minus the average product correction S 1 1ᵀ S / 1ᵀ S 1 (Dunn et al., 2008, doi
        10.1093/bioinformatics/btm604), times the head's weight. The sum over heads needs no second tensor [n, r, r].
        """
        weight_n = self.weight[0, first:first + len(map_nrr)].float()
        summed_rr = torch.tensordot(weight_n, map_nrr, 1)
        margin_nr = map_nrr.sum(1) + map_nrr.sum(2)
        scaled_nr = margin_nr * (weight_n / margin_nr.sum(1))[:, None]
        return summed_rr + summed_rr.t() - scaled_nr.t() @ margin_nr
