"""Attention inside each protein of a packed row: no residue sees another protein.

Shapes: t flat tokens of all proteins of a micro-batch, u of them on this rank (t / ranks of the context axis), n heads,
d head width, g proteins. Queries, keys and values come as one tensor `qkv_un3d`, as the fused projection makes it.
Scores are scaled by 1/sqrt(d); softmax is in fp32.

On several context ranks each computes the contexts of its own tokens, from the keys and values of all.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from megatron.parallel.collectives import all_gather, gather_slices, reduce_scatter
from megatron.parallel.mesh import Axis

_ONE_RANK = Axis()


@dataclass(frozen=True)
class Boundaries:
    """Where proteins begin and end among flat tokens.

    `cu_seqlens` int32 [g + 1] on the device: protein i is `cu_seqlens[i]:cu_seqlens[i+1]`. `lengths`: the same on the
    host, so that no step waits for the device.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]


def packed_attention(qkv_un3d: Tensor, boundaries: Boundaries, dropout: float, context: Axis = _ONE_RANK) -> Tensor:
    """The context [u, n, d] of each token; `dropout` is the rate on the probabilities (0 outside training).

    Rank r of `context` holds tokens `r*u:(r+1)*u` of those that `boundaries` describe, on every rank the same. A dry
    run's tensors, which stand for a GPU's, take the GPU's way.
    """
    if not len(qkv_un3d):  # on all ranks alike: nothing to compute or to gather
        return qkv_un3d[:, :, 0]
    share = share_of(boundaries.lengths, context)
    width = qkv_un3d.shape[-1]
    is_on_gpu = qkv_un3d.device.type == "cuda" or isinstance(qkv_un3d, FakeTensor)
    if is_on_gpu and qkv_un3d.dtype != torch.float32 and width % 8 == 0 and width <= 256:
        return _flash(qkv_un3d, boundaries.cu_seqlens, share, dropout, context)
    return _ProteinByProtein.apply(qkv_un3d, share, dropout, context)


def attention_reference(qkv_tn3d: Tensor, boundaries: Boundaries, dropout: float) -> Tensor:
    """The context [t, n, d] by the definition: all scores, those between proteins masked. The oracle of the tests."""
    query_tnd, key_tnd, value_tnd = qkv_tn3d.unbind(2)
    lengths = torch.tensor(boundaries.lengths, device=qkv_tn3d.device)
    protein_t = torch.repeat_interleave(torch.arange(len(lengths), device=qkv_tn3d.device), lengths)
    scores_ntt = torch.einsum("tnd,snd->nts", query_tnd, key_tnd).float() * query_tnd.shape[-1] ** -0.5
    is_other_tt = protein_t[:, None] != protein_t[None, :]
    probabilities_ntt = scores_ntt.masked_fill(is_other_tt, float("-inf")).softmax(-1)
    probabilities_ntt = F.dropout(probabilities_ntt, dropout).to(value_tnd.dtype)
    return torch.einsum("nts,snd->tnd", probabilities_ntt, value_tnd)


@dataclass(frozen=True)
class Share:
    """What one context rank computes: the proteins in which its tokens lie, from number `first` on.

    `query_lengths`: how many tokens of each are the rank's own; one behind the other they are all that it has.
    `key_lengths`: how many tokens each has in all; they lie one behind the other from token `key_start` on.
    """

    first: int
    query_lengths: tuple[int, ...]
    key_start: int
    key_lengths: tuple[int, ...]


def share_of(lengths: tuple[int, ...], context: Axis) -> Share:
    """The share of this rank of `context`, over which the tokens of proteins of these lengths are split equally."""
    ends = list(accumulate(lengths))
    num_tokens = sum(lengths) // context.size
    start = context.rank * num_tokens
    end = start + num_tokens
    first, last = bisect_right(ends, start), bisect_left(ends, end) + 1
    key_lengths = lengths[first:last]
    queries = (min(stop, end) - max(stop - length, start)
               for stop, length in zip(ends[first:last], key_lengths, strict=True))
    return Share(first, tuple(queries), sum(lengths[:first]), key_lengths)


def _flash(qkv_un3d: Tensor, ends: Tensor, share: Share, dropout: float, context: Axis) -> Tensor:
    if context.size == 1:
        query_und, key_tnd, value_tnd = qkv_un3d.unbind(2)
        query_ends = key_ends = ends
    else:
        query_un1d, key_value_un2d = qkv_un3d.split([1, 2], dim=2)
        query_und, num_queries = query_un1d.squeeze(2), len(qkv_un3d)
        key_value_tn2d = gather_slices(key_value_un2d, context)
        key_tnd, value_tnd = key_value_tn2d.narrow(0, share.key_start, sum(share.key_lengths)).unbind(2)
        ends = ends[share.first:share.first + len(share.key_lengths) + 1]
        query_ends = (ends - context.rank * num_queries).clamp(0, num_queries)
        key_ends = ends - share.key_start
    # The public torch.nn.attention.varlen has no dropout (torch 2.13); this operator under it has.
    return torch.ops.aten._flash_attention_forward(query_und, key_tnd, value_tnd, query_ends, key_ends,
                                                   max(share.query_lengths), max(share.key_lengths), dropout,
                                                   False, False)[0]


class _ProteinByProtein(torch.autograd.Function):
    """Two matrix products and a softmax a protein. On CPUs faster than any fused path (see benchmarks/RESULTS.md).

    Of the keys and values only the rank's own are kept for the backward pass, which gathers all of them again.
    """

    @staticmethod
    def forward(ctx, qkv_un3d: Tensor, share: Share, dropout: float, context: Axis) -> Tensor:
        """Context [u, n, d]; keeps the probabilities [n, queries, keys] of each protein for the backward pass.

        Communication: an all-gather of keys and values.
        """
        tokens, heads, _, width = qkv_un3d.shape
        context_und = qkv_un3d.new_empty(tokens, heads, width)
        key_value_tn2d = all_gather(qkv_un3d[:, :, 1:], context)
        saved: list[Tensor] = []
        proteins = zip(_by_protein(qkv_un3d[:, :, 0], key_value_tn2d, share), context_und.split(share.query_lengths),
                       strict=True)
        for (query, key, value), result in proteins:
            scores = torch.bmm(query * width**-0.5, key.transpose(1, 2))
            probabilities = scores.softmax(-1)
            saved.append(probabilities)
            if dropout:
                keep = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout)
                saved.append(keep)
                probabilities = probabilities * keep
            result.copy_(torch.bmm(probabilities, value).transpose(0, 1))
        ctx.save_for_backward(qkv_un3d, *saved)
        ctx.share, ctx.has_dropout, ctx.context = share, bool(dropout), context
        return context_und

    @staticmethod
    def backward(ctx, grad_und: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of `qkv_un3d`, [u, n, 3, d].

        Communication: the all-gather again, and a reduce-scatter of the gradients of keys and values.
        """
        qkv_un3d, *saved = ctx.saved_tensors
        share, context = ctx.share, ctx.context
        key_value_tn2d = all_gather(qkv_un3d[:, :, 1:], context)
        grad_qkv_un3d = torch.empty_like(qkv_un3d)
        grad_own_un2d = grad_qkv_un3d[:, :, 1:]
        # One rank's are the result itself; those of several are summed first, 0 where a protein has no query here.
        grad_key_value_tn2d = torch.zeros_like(key_value_tn2d) if context.size > 1 else grad_own_un2d
        kept = iter(saved)
        proteins = zip(_by_protein(qkv_un3d[:, :, 0], key_value_tn2d, share),
                       _by_protein(grad_qkv_un3d[:, :, 0], grad_key_value_tn2d, share),
                       grad_und.split(share.query_lengths), strict=True)
        for (query, key, value), (grad_query, grad_key, grad_value), grad in proteins:
            probabilities = next(kept)
            grad_context = grad.transpose(0, 1)
            grad_probabilities = torch.bmm(grad_context, value.transpose(1, 2))
            dropped = probabilities
            if ctx.has_dropout:
                keep = next(kept)
                grad_probabilities *= keep
                dropped = probabilities * keep
            grad_value.copy_(torch.bmm(dropped.transpose(1, 2), grad_context))
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            grad_scores *= query.shape[-1]**-0.5
            grad_query.copy_(torch.bmm(grad_scores, key))
            grad_key.copy_(torch.bmm(grad_scores.transpose(1, 2), query))
        if context.size > 1:
            grad_own_un2d.copy_(reduce_scatter(grad_key_value_tn2d, context))
        return grad_qkv_un3d, None, None, None


def _by_protein(query_und: Tensor, key_value_tn2d: Tensor, share: Share) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of each protein: its queries on this rank [n, queries, d], its keys and its values [n, keys, d]."""
    queries = query_und.transpose(0, 1).split(share.query_lengths, dim=1)
    touched_tn2d = key_value_tn2d.narrow(0, share.key_start, sum(share.key_lengths))
    keys, values = (whole_tnd.transpose(0, 1).split(share.key_lengths, dim=1) for whole_tnd in touched_tn2d.unbind(2))
    return zip(queries, keys, values, strict=True)
