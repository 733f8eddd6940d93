"""Attention inside each protein of a packed sequence: no residue sees another protein.

Shapes: t flat tokens, n heads in g groups of q, d head width. Queries, keys and values come as one tensor `qkv_tgcd`,
as the fused projection makes it: for each group c = q + 2 rows, its queries, its key and its value (grouped-query
attention, Ainslie et al., 2023, arXiv 2305.13245; ordinary attention where q is 1). Scores are scaled by 1/sqrt(d);
softmax is computed in fp32. Under a window (left, right) a token attends to so many on each side of it (Beltagy et al.,
2020, arXiv 2004.05150).

On GPUs an operator does all proteins at once (`fused`): PyTorch's FlashAttention where it can, which is in half
precision without dropout, else Triton's kernels. On CPUs it is compiled code (`compiled`), which was faster in every
shape that was measured (see benchmarks/RESULTS.md). Where that is not built, and on GPUs from before Ampere, it is a
loop over proteins (`by_protein`).
"""

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from megatron.kernels.attention.asked import WORDS, asked_attention, check_asked, what_varlen_lacks
from megatron.kernels.attention.by_protein import Window, attention_by_protein
from megatron.kernels.attention.compiled import INSTRUCTION_SETS, compiled_attention, takes_helper
from megatron.kernels.attention.fused import fused_attention, is_fused, takes_varlen
from megatron.kernels.dropout import Dropout, is_kept
from megatron.kernels.packed_sequence import PackedSequence, proteins_of_tokens


def packed_attention(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None, window: Window = None,
                     backend: str = "auto") -> Tensor:
    """The context [t, n, d] of each token; `dropout` is that of the probabilities (None outside training).

    `backend`: that of `--attention-backend`; raises ConfigError where it does not take these.
    """
    if backend != "auto":
        return asked_attention(backend, qkv_tgcd, sequence, dropout, window)
    if is_fused(qkv_tgcd, dropout is not None, window):
        return fused_attention(qkv_tgcd, None, sequence, 0, dropout, window)
    if takes_helper(qkv_tgcd):
        return compiled_attention(qkv_tgcd, sequence.cu_seqlens, sequence.num_filler, window, dropout)
    return attention_by_protein(qkv_tgcd, sequence.cu_seqlens, sequence.num_filler, window, dropout)


def way_of(qkv_tgcd: Tensor, has_dropout: bool, window: Window = None, is_whole: bool = True,
           backend: str = "auto") -> str:
    """What computes attention of such tensors, in words, and why nothing faster does; `is_whole`: on one context rank.

    Raises ConfigError where Triton alone is missing, and where what is asked for does not take them.
    """
    if backend != "auto":
        check_asked(backend, qkv_tgcd, has_dropout, window, is_whole)
        return f"{WORDS[backend]} (as --attention-backend says)"
    if is_fused(qkv_tgcd, has_dropout, window, is_whole):
        if takes_varlen(qkv_tgcd, qkv_tgcd.shape[2] - 2, has_dropout, window, is_whole):
            return f"{WORDS['varlen']} ({current_flash_attention_impl() or 'FA2'})"
        lacking = what_varlen_lacks(qkv_tgcd, has_dropout, window, is_whole)
        return f"{WORDS['triton']} (varlen_attn takes no {lacking})"
    if takes_helper(qkv_tgcd):
        return f"compiled code ({INSTRUCTION_SETS[0]})"
    if qkv_tgcd.device.type != "cpu":
        return "PyTorch one protein at a time, which is slow (no kernel takes this GPU, dtype and width)"
    why = "takes fp32 and bf16" if INSTRUCTION_SETS else "is not built"
    return f"PyTorch one protein at a time (compiled code {why})"


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
