"""From hidden states to logits over the vocabulary. Shapes: m tokens, h hidden, r rows and v ids of this rank."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.kernels.cross_entropy import softcapped
from megatron.model.initialisation import normal
from megatron.model.normalisation import norm
from megatron.parallel.parameters import Constant, Declaration, whole_parameter
from megatron.parallel.tensor.layers import Linear, Matrix
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.parallel.tensor.vocabulary import vocabulary_logits, vocabulary_loss, vocabulary_parameter


class MaskedLMHead(nn.Module):
    """Dense, exact GeLU, norm, then the word embedding's transpose and a bias, as in BERT.

    Untied, the transpose is that of a matrix of its own, `decoder`. Up to the norm every tensor rank computes alike;
    the vocabulary is split. With `--final-logit-softcapping` c a logit x becomes c·tanh(x / c) (Gemma 2, arXiv
    2408.00118).
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream,
                 loss_in_fp32: bool = True) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, normal(config), not config.disable_bias_linear)
        self.layernorm = norm(config, ONE_RANK_STREAM)
        self.num_ids, self.axis = padded_vocab_size, stream.axis
        self.decoder = Decoder(config, padded_vocab_size, stream) if has_decoder(config) else None
        self.bias = vocabulary_parameter((padded_vocab_size,), config.make_vocab_size_divisible_by, stream.axis,
                                         Declaration(Constant(0.0), "head", decays=False))
        self.softcap, self.loss_in_fp32 = config.final_logit_softcapping, loss_in_fp32

    def forward(self, hidden_mh: Tensor, word_embeddings: Matrix | None) -> Tensor:
        """Logits [m, v]; every rank gives the same hidden states. `word_embeddings` are taken where it is tied."""
        matrix = self._matrix(word_embeddings)
        logits_mv = vocabulary_logits(self._features(hidden_mh), matrix, self.bias, self.num_ids, self.axis)
        return softcapped(logits_mv, self.softcap)

    def loss(self, hidden_mh: Tensor, word_embeddings: Matrix | None, target_ids_m: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross entropy (nats, fp32) of the targets, and how many are the likeliest id: no logits stay."""
        return vocabulary_loss(self._features(hidden_mh), self._matrix(word_embeddings), self.bias, target_ids_m,
                               self.num_ids, self.axis, self.softcap,
                               torch.float32 if self.loss_in_fp32 else hidden_mh.dtype)

    def _features(self, hidden_mh: Tensor) -> Tensor:
        """[m, h], what the matrix is multiplied with."""
        return self.layernorm(F.gelu(self.dense(hidden_mh)))

    def _matrix(self, word_embeddings: Matrix | None) -> Matrix:
        matrix = self.decoder or word_embeddings
        assert matrix is not None, "a tied head has the embeddings"
        return matrix


class Decoder(Matrix):
    """The matrix of a head that is not tied: a row for each id, split over the tensor axis."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int, stream: Stream) -> None:
        super().__init__()
        self.weight = vocabulary_parameter((padded_vocab_size, config.hidden_size), config.make_vocab_size_divisible_by,
                                           stream.axis, Declaration(normal(config), "head", decays=True))


class ContactHead(nn.Module):
    """ESM's logistic regression from attention maps to contacts (Rao et al., 2021, bioRxiv 2020.12.15.422761).

    A weight for each head of each block. Fitted on structures, not pretrained: who came with it leaves with it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        carried = Declaration(Constant(0.0), "head", decays=False, is_trained=False)
        self.weight = whole_parameter((1, config.num_layers * config.num_attention_heads), carried)
        self.bias = whole_parameter((1,), carried)

    def forward(self, map_nrr: Tensor, first: int) -> Tensor:
        """What maps among r residues add to the logits [r, r], without the bias: those of n heads from number `first`.

        A map plus its transpose, S, less its average product, S 1 1ᵀ S / 1ᵀ S 1 (Dunn et al., 2008, doi
        10.1093/bioinformatics/btm604), times the head's weight; summed over the heads without another tensor of n maps.
        """
        weight_n = self.weight[0, first:first + len(map_nrr)].float()
        summed_rr = torch.tensordot(weight_n, map_nrr, 1)
        margin_nr = map_nrr.sum(1) + map_nrr.sum(2)
        scaled_nr = margin_nr * (weight_n / margin_nr.sum(1))[:, None]
        return summed_rr + summed_rr.t() - scaled_nr.t() @ margin_nr


def has_decoder(config: ModelConfig) -> bool:
    """Whether the head has a matrix of its own for the logits."""
    return config.untie_embeddings_and_output_weights
