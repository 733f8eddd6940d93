"""Attention that also returns its maps: the probabilities with which tokens attend to each other, a protein at a time.

The kernels that compute the context keep the softmax statistics of each query. Together with queries and keys these
give each probability directly, so a map is written in one pass and never read back: by a Triton kernel on GPUs, by a
matrix product elsewhere. There is no dropout and no gradient.
Shapes: t tokens, n heads in g groups of c = q + 2 rows (queries, key, value) of width d; k tokens of a protein.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron.kernels.attention.backends import choose
from megatron.kernels.attention.by_protein import Window
from megatron.kernels.attention.fused import context_and_logsumexp
from megatron.kernels.attention.native import NativePass
from megatron.kernels.attention.packed import packed_attention
from megatron.kernels.device import runs_triton
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths


@torch.no_grad()
def attention_with_maps(qkv_tgcd: Tensor, sequence: PackedSequence,
                        window: Window = None) -> tuple[Tensor, Iterator[Tensor]]:
    """The context [t, n, d], and for each non-empty protein the probabilities [n, k, k] (queries, keys; fp32).

    Each map is computed when the iterator reaches it, so only one need be in memory. The host waits for the lengths of
    the proteins. `window`: how many tokens before and after itself a query attends to; None: all of its protein.
    """
    qkv_tgcd = qkv_tgcd.detach()  # the maps are made after this function, and its no_grad, has ended
    lengths = protein_lengths(sequence.cu_seqlens, sequence.num_filler)
    name = choose(qkv_tgcd, False, window)
    if name in ("varlen", "triton") and runs_triton(qkv_tgcd):
        context_tnd, logsumexp_nt = context_and_logsumexp(qkv_tgcd, sequence, window)
        return context_tnd, maps_by_triton(qkv_tgcd, logsumexp_nt, lengths, window)
    if name == "compiled":
        qkv_tgcd = qkv_tgcd.contiguous()
        going = NativePass(lengths, 0, len(qkv_tgcd), window)
        context_tgqd, statistics_tgq2 = going.forward(qkv_tgcd[:, :, :-2], qkv_tgcd[:, :, -2:])
        return context_tgqd.flatten(1, 2), maps_by_statistics(qkv_tgcd, statistics_tgq2, lengths, window)
    return packed_attention(qkv_tgcd, sequence, None, window), maps_by_softmax(qkv_tgcd, lengths, window)


def maps_by_softmax(qkv_tgcd: Tensor, lengths: Sequence[int], window: Window) -> Iterator[Tensor]:
    """The maps, computed with PyTorch from queries and keys alone."""
    for protein in _proteins(lengths):
        yield _scores(qkv_tgcd[protein], window).softmax(-1)


def maps_by_statistics(qkv_tgcd: Tensor, statistics_tgq2: Tensor, lengths: Sequence[int],
                       window: Window) -> Iterator[Tensor]:
    """The maps, from the statistics of the C++ helper: the softmax's largest score, in base 2, and 1 / its sum."""
    for protein in _proteins(lengths):
        largest_nk, inverse_nk = statistics_tgq2[protein].flatten(1, 2).unbind(-1)
        scores_nkk = _scores(qkv_tgcd[protein], window).div_(math.log(2)).sub_(largest_nk.t()[:, :, None])
        yield scores_nkk.exp2_().mul_(inverse_nk.t()[:, :, None])


def maps_by_triton(qkv_tgcd: Tensor, logsumexp_nt: Tensor, lengths: Sequence[int], window: Window) -> Iterator[Tensor]:
    """The maps, from the fused GPU operator's statistics: the base-2 logsumexp of each query."""
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
    """The scaled scores of one protein [n, k, k] in fp32, -inf outside the window."""
    num_groups, num_rows, width = qkv_kgcd.shape[1:]
    rows_gckd = qkv_kgcd[:, :, :-1].permute(1, 2, 0, 3).float()
    query_gxd, key_gkd = rows_gckd[:, :-1].flatten(1, 2) * width**-0.5, rows_gckd[:, -1]
    scores_nkk = torch.bmm(query_gxd, key_gkd.transpose(1, 2)).view(num_groups * (num_rows - 2), *[len(qkv_kgcd)] * 2)
    if window is not None:
        place_k = torch.arange(len(qkv_kgcd), device=qkv_kgcd.device)
        behind_kk = place_k - place_k[:, None]
        scores_nkk.masked_fill_((behind_kk < -window[0]) | (behind_kk > window[1]), -torch.inf)
    return scores_nkk
