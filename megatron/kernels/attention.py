"""Attention inside each protein of a packed sequence: no residue sees another protein.

Shapes: t flat tokens, n heads in g groups of q, d head width; u tokens with queries where keys and values come from
more. They come as one tensor `qkv_tgcd`, as the fused projection makes it: for each group c = q + 2 rows, its queries,
its key and its value (grouped-query attention, Ainslie et al., 2023, arXiv 2305.13245; ordinary attention where q is
1). Scores are scaled by 1/sqrt(d); softmax is in fp32. Under a window (left, right) a token attends to so many on each
side of it (Beltagy et al., 2020, arXiv 2004.05150). On GPUs one fused operator does all proteins at once, by boundaries
on the device. On CPUs it is `megatron.kernels.cpu_attention`, which was faster in every shape that was measured (see
benchmarks/RESULTS.md), or where that is not built `megatron.kernels.by_protein`; both skip the filler.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from megatron.kernels.by_protein import Window, attention_by_protein
from megatron.kernels.cpu_attention import cpu_attention, takes_helper
from megatron.kernels.device import takes_gpu_way
from megatron.kernels.packed_sequence import PackedSequence, proteins_of_tokens


def packed_attention(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: float, window: Window = None) -> Tensor:
    """The context [t, n, d] of each token; `dropout` is the rate on the probabilities (0 outside training)."""
    if is_fused(qkv_tgcd, window):
        ends, longest = sequence.cu_seqlens, sequence.max_length
        return fused_attention(qkv_tgcd[:, :, :-2], qkv_tgcd[:, :, -2:], (ends, ends), (longest, longest), dropout,
                               window)
    if takes_helper(qkv_tgcd):
        return cpu_attention(qkv_tgcd, sequence.cu_seqlens, sequence.num_filler, window, dropout)
    return attention_by_protein(qkv_tgcd, sequence.cu_seqlens, sequence.num_filler, window, dropout)


def attention_reference(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: float, window: Window = None) -> Tensor:
    """The context [t, n, d] by the definition: all scores, those that do not count masked. The oracle of the tests."""
    queries = qkv_tgcd.shape[2] - 2
    query_tnd = qkv_tgcd[:, :, :-2].flatten(1, 2)
    key_tnd, value_tnd = (tensor.repeat_interleave(queries, 1) for tensor in qkv_tgcd[:, :, -2:].unbind(2))
    scores_ntt = torch.einsum("tnd,snd->nts", query_tnd, key_tnd).float() * query_tnd.shape[-1] ** -0.5
    protein_t = proteins_of_tokens(sequence.cu_seqlens, 0, len(qkv_tgcd))
    place_t = torch.arange(len(qkv_tgcd), device=qkv_tgcd.device)
    is_apart_tt = protein_t[:, None] != protein_t[None, :]
    if window is not None:
        behind_tt = place_t[None, :] - place_t[:, None]
        is_apart_tt |= (behind_tt < -window[0]) | (behind_tt > window[1])
    probabilities_ntt = scores_ntt.masked_fill(is_apart_tt, float("-inf")).softmax(-1)
    probabilities_ntt = F.dropout(probabilities_ntt, dropout).to(value_tnd.dtype)
    return torch.einsum("nts,snd->tnd", probabilities_ntt, value_tnd)


def is_fused(qkv_tgcd: Tensor, window: Window = None, is_whole: bool = True) -> bool:
    """Whether a fused operator takes these: on GPUs, and for fake tensors, which stand for a GPU's.

    Of a window FlashAttention alone knows, and counts it from each protein's end: so it is to have the whole proteins.
    """
    if not takes_gpu_way(qkv_tgcd) or qkv_tgcd.shape[-1] % 8:
        return False
    return window is None or _is_fake(qkv_tgcd) or (is_whole and _takes_flash(qkv_tgcd))


def fused_attention(query_ugqd: Tensor, key_value_tg2d: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int],
                    dropout: float, window: Window = None) -> Tensor:
    """The context [u, n, d]; `ends` (int32, on the device) and `longest` are those of queries and of keys.

    FlashAttention in half precision; the memory-efficient operator in fp32 and on GPUs before Ampere.
    """
    query_und = query_ugqd.flatten(1, 2)
    key_tgd, value_tgd = key_value_tg2d.unbind(2)
    # The public torch.nn.attention.varlen has no dropout (torch 2.13); the operator under it has.
    if _takes_flash(query_und):
        left, right = window or (None, None)
        return torch.ops.aten._flash_attention_forward(query_und, key_tgd, value_tgd, *ends, *longest, dropout, False,
                                                       False, window_size_left=left, window_size_right=right)[0]
    if query_ugqd.shape[2] > 1:  # it takes as many keys as queries
        key_tgd, value_tgd = (tensor.repeat_interleave(query_ugqd.shape[2], 1) for tensor in (key_tgd, value_tgd))
    one_row = (tensor[None] for tensor in (query_und, key_tgd, value_tgd))
    goes_back = torch.is_grad_enabled() and query_und.requires_grad
    return torch.ops.aten._efficient_attention_forward(*one_row, None, *ends, *longest, dropout, 0, goes_back)[0][0]


def _takes_flash(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float32 or tensor.shape[-1] > 256:
        return False
    return _is_fake(tensor) or torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _is_fake(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)
