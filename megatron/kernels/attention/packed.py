"""Attention inside each protein of a packed sequence: no residue sees another protein.

Shapes: t flat tokens, n heads in g groups of q, d head width. Queries, keys and values come as one tensor `qkv_tgcd`,
as the fused projection makes it: for each group c = q + 2 rows, its queries, its key and its value (grouped-query
attention, Ainslie et al., 2023, arXiv 2305.13245; ordinary attention where q is 1). Scores are scaled by 1/sqrt(d);
softmax is computed in fp32. Under a window (left, right) a token attends to so many on each side of it (Beltagy et al.,
2020, arXiv 2004.05150).

`backends` chooses what computes it. On GPUs one operator takes all proteins at once (`fused`): PyTorch's varlen_attn
(FlashAttention) where it can, which is in half precision without dropout, else Triton's kernels. On CPUs it is the
C++ helper (`native`; to the user `compiled`), the fastest in every shape that was measured (see benchmarks/RESULTS.md).
Where that is not built, and on GPUs from before Ampere, PyTorch computes one protein at a time (`by_protein`).
"""

import torch
from torch import Tensor

from megatron.kernels.attention.backends import BACKENDS, choose
from megatron.kernels.attention.by_protein import Window
from megatron.kernels.dropout import Dropout, is_kept
from megatron.kernels.packed_sequence import PackedSequence, proteins_of_tokens


def packed_attention(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None, window: Window = None,
                     backend: str = "auto") -> Tensor:
    """The context [t, n, d] of each token; `dropout` is that of the probabilities (None outside training).

    `backend`: that of `--attention-backend`; raises ConfigError where it does not take these.
    """
    name = choose(qkv_tgcd, dropout is not None, window, backend=backend)
    return BACKENDS[name].run(qkv_tgcd, sequence, dropout, window)


def attention_reference(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None = None,
                        window: Window = None) -> Tensor:
    """The context [t, n, d] by the definition: all scores, those that do not count masked. The oracle of the tests."""
    queries = qkv_tgcd.shape[2] - 2
    query_tnd = qkv_tgcd[:, :, :-2].flatten(1, 2)
    key_tnd, value_tnd = (tensor.repeat_interleave(queries, 1) for tensor in qkv_tgcd[:, :, -2:].unbind(2))
    scores_ntt = torch.einsum("tnd,snd->nts", query_tnd, key_tnd)
    scores_ntt = scores_ntt.to(torch.promote_types(scores_ntt.dtype, torch.float32)) * query_tnd.shape[-1]**-0.5
    protein_t = proteins_of_tokens(sequence.cu_seqlens, 0, len(qkv_tgcd))
    place_t = torch.arange(len(qkv_tgcd), device=qkv_tgcd.device)
    is_apart_tt = protein_t[:, None] != protein_t[None, :]
    if window is not None:
        behind_tt = place_t[None, :] - place_t[:, None]
        is_apart_tt |= (behind_tt < -window[0]) | (behind_tt > window[1])
    probabilities_ntt = scores_ntt.masked_fill(is_apart_tt, float("-inf")).softmax(-1)
    if dropout is not None:
        size = len(qkv_tgcd)
        keeps_ntt = is_kept(dropout, size, range(size), len(probabilities_ntt))
        probabilities_ntt = probabilities_ntt * keeps_ntt * dropout.growth
    return torch.einsum("nts,snd->tnd", probabilities_ntt.to(value_tnd.dtype), value_tnd)
