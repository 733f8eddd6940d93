"""Attention with its maps: the probabilities with which each residue attends to the others, one protein at a time.

What computes the context knows of each query the softmax's sum; from that, queries and keys each probability follows,
so that a map is written once and never read again: by a Triton kernel on GPUs, elsewhere by one matrix product. Without
dropout, and without gradients. Shapes as in `packed`, k tokens of a protein.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron.kernels.attention.backends import choose
from megatron.kernels.attention.by_protein import Window
from megatron.kernels.attention.compiled import CompiledPass
from megatron.kernels.attention.fused import context_and_logsumexp
from megatron.kernels.attention.packed import packed_attention
from megatron.kernels.device import runs_triton
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths


@torch.no_grad()
def attention_with_maps(qkv_tgcd: Tensor, sequence: PackedSequence,
                        window: Window = None) -> tuple[Tensor, Iterator[Tensor]]:
    """The context [t, n, d], and of each protein that is not empty the probabilities [n, k, k] (queries, keys; fp32).

    Each map is made when it is asked for: memory holds that of one protein. The host waits for the proteins' lengths.
    """
    qkv_tgcd = qkv_tgcd.detach()  # the maps are made after this has ended
    lengths = protein_lengths(sequence.cu_seqlens, sequence.num_filler)
    name = choose(qkv_tgcd, False, window)
    if name in ("varlen", "triton") and runs_triton(qkv_tgcd):
        context_tnd, logsumexp_nt = context_and_logsumexp(qkv_tgcd, sequence, window)
        return context_tnd, maps_by_triton(qkv_tgcd, logsumexp_nt, lengths, window)
    if name == "compiled":
        qkv_tgcd = qkv_tgcd.contiguous()
        going = CompiledPass(lengths, 0, len(qkv_tgcd), window)
        context_tgqd, statistics_tgq2 = going.forward(qkv_tgcd[:, :, :-2], qkv_tgcd[:, :, -2:])
        return context_tgqd.flatten(1, 2), maps_by_statistics(qkv_tgcd, statistics_tgq2, lengths, window)
    return packed_attention(qkv_tgcd, sequence, None, window), maps_by_softmax(qkv_tgcd, lengths, window)


def maps_by_softmax(qkv_tgcd: Tensor, lengths: Sequence[int], window: Window) -> Iterator[Tensor]:
    """By PyTorch alone, from queries and keys."""
    for protein in _proteins(lengths):
        yield _scores(qkv_tgcd[protein], window).softmax(-1)


def maps_by_statistics(qkv_tgcd: Tensor, statistics_tgq2: Tensor, lengths: Sequence[int],
                       window: Window) -> Iterator[Tensor]:
    """From what the compiled helper keeps: the softmax's largest score, as an exponent of 2, and 1 / its sum."""
    for protein in _proteins(lengths):
        largest_nk, inverse_nk = statistics_tgq2[protein].flatten(1, 2).unbind(-1)
        scores_nkk = _scores(qkv_tgcd[protein], window).div_(math.log(2)).sub_(largest_nk.t()[:, :, None])
        yield scores_nkk.exp2_().mul_(inverse_nk.t()[:, :, None])


def maps_by_triton(qkv_tgcd: Tensor, logsumexp_nt: Tensor, lengths: Sequence[int], window: Window) -> Iterator[Tensor]:
    """From what the fused operator keeps: the base-2 logarithm of the softmax's sum."""
    from megatron.kernels.attention.maps_triton import launch_map  # it imports Triton, which may be missing

    qkv_tgcd = qkv_tgcd.contiguous()
    for protein in _proteins(lengths):
        length = protein.stop - protein.start
        map_nkk = logsumexp_nt.new_empty(len(logsumexp_nt), length, length)
        launch_map(qkv_tgcd, logsumexp_nt, protein.start, window, map_nkk)
        yield map_nkk


def _proteins(lengths: Sequence[int]) -> Iterator[slice]:
    ends = [0, *accumulate(lengths)]
    yield from (slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True))


def _scores(qkv_kgcd: Tensor, window: Window) -> Tensor:
    """[n, k, k] of one protein in fp32, -inf where a window ends."""
    num_groups, num_rows, width = qkv_kgcd.shape[1:]
    rows_gckd = qkv_kgcd[:, :, :-1].permute(1, 2, 0, 3).float()
    query_gxd, key_gkd = rows_gckd[:, :-1].flatten(1, 2) * width**-0.5, rows_gckd[:, -1]
    scores_nkk = torch.bmm(query_gxd, key_gkd.transpose(1, 2)).view(num_groups * (num_rows - 2), *[len(qkv_kgcd)] * 2)
    if window is not None:
        place_k = torch.arange(len(qkv_kgcd), device=qkv_kgcd.device)
        behind_kk = place_k - place_k[:, None]
        scores_nkk.masked_fill_((behind_kk < -window[0]) | (behind_kk > window[1]), -torch.inf)
    return scores_nkk
