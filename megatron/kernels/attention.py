"""Attention inside each protein of a packed sequence: no residue sees another protein.

Shapes: t flat tokens, n heads, d head width; u tokens with queries where keys and values come from more. Queries, keys
and values come as one tensor `qkv_tn3d`, as the fused projection makes it. Scores are scaled by 1/sqrt(d); softmax is
in fp32. On GPUs one fused operator does all proteins at once, by boundaries on the device; on CPUs two matrix products
and a softmax a protein are faster than any fused path (see benchmarks/RESULTS.md), and the filler is skipped.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from megatron.kernels.device import takes_gpu_way
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths


def packed_attention(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: float) -> Tensor:
    """The context [t, n, d] of each token; `dropout` is the rate on the probabilities (0 outside training)."""
    if is_fused(qkv_tn3d):
        ends, longest = sequence.cu_seqlens, sequence.max_length
        query_tnd, key_tnd, value_tnd = qkv_tn3d.unbind(2)
        return fused_attention(query_tnd, key_tnd, value_tnd, (ends, ends), (longest, longest), dropout)
    by_protein = _attention_by_protein if torch.compiler.is_compiling() else _ByProtein.apply
    return by_protein(qkv_tn3d, sequence.cu_seqlens, sequence.num_filler, dropout)[0]


def attention_reference(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: float) -> Tensor:
    """The context [t, n, d] by the definition: all scores, those between proteins masked. The oracle of the tests."""
    query_tnd, key_tnd, value_tnd = qkv_tn3d.unbind(2)
    lengths = torch.diff(sequence.cu_seqlens)
    protein_t = torch.repeat_interleave(torch.arange(len(lengths), device=qkv_tn3d.device), lengths)
    scores_ntt = torch.einsum("tnd,snd->nts", query_tnd, key_tnd).float() * query_tnd.shape[-1] ** -0.5
    is_other_tt = protein_t[:, None] != protein_t[None, :]
    probabilities_ntt = scores_ntt.masked_fill(is_other_tt, float("-inf")).softmax(-1)
    probabilities_ntt = F.dropout(probabilities_ntt, dropout).to(value_tnd.dtype)
    return torch.einsum("nts,snd->tnd", probabilities_ntt, value_tnd)


def is_fused(qkv_tn3d: Tensor) -> bool:
    """Whether a fused operator takes these: on GPUs, and for fake tensors, which stand for a GPU's."""
    return takes_gpu_way(qkv_tn3d) and qkv_tn3d.shape[-1] % 8 == 0


def fused_attention(query_und: Tensor, key_tnd: Tensor, value_tnd: Tensor, ends: tuple[Tensor, Tensor],
                    longest: tuple[int, int], dropout: float) -> Tensor:
    """The context [u, n, d]; `ends` (int32, on the device) and `longest` are those of queries and of keys.

    FlashAttention in half precision; the memory-efficient operator in fp32 and on GPUs before Ampere.
    """
    # The public torch.nn.attention.varlen has no dropout (torch 2.13); the operator under it has.
    if query_und.dtype != torch.float32 and query_und.shape[-1] <= 256 and _has_flash(query_und):
        return torch.ops.aten._flash_attention_forward(query_und, key_tnd, value_tnd, *ends, *longest, dropout, False,
                                                       False)[0]
    one_row = (tensor[None] for tensor in (query_und, key_tnd, value_tnd))
    goes_back = torch.is_grad_enabled() and query_und.requires_grad
    return torch.ops.aten._efficient_attention_forward(*one_row, None, *ends, *longest, dropout, 0, goes_back)[0][0]


def _has_flash(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor) or torch.cuda.get_device_capability(tensor.device) >= (8, 0)


@dataclass(frozen=True)
class Share:
    """What is computed of proteins of which only some tokens have queries here.

    `query_lengths`: how many tokens of each have; one behind the other they are the first ones of the queries.
    `key_lengths`: how many tokens each has in all; they lie one behind the other from token `key_start` on.
    """

    query_lengths: tuple[int, ...]
    key_start: int
    key_lengths: tuple[int, ...]


def share_of(lengths: Sequence[int], start: int, end: int) -> Share:
    """The share of proteins of these lengths, none of them 0, whose queries are the tokens `start:end`."""
    ends = list(accumulate(lengths))
    first, last = bisect_right(ends, start), bisect_left(ends, end) + 1
    key_lengths = tuple(lengths[first:last])
    queries = (min(stop, end) - max(stop - length, start)
               for stop, length in zip(ends[first:last], key_lengths, strict=True))
    return Share(tuple(queries), sum(lengths[:first]), key_lengths)


def forward_by_protein(query_und: Tensor, key_value_tn2d: Tensor, share: Share,
                       dropout: float) -> tuple[Tensor, list[Tensor]]:
    """The context [u, n, d], 0 behind the last protein, and what the backward pass needs.

    That is the probabilities [n, queries, keys] of each protein, each followed by dropout's factors if there is any.
    """
    context_und = torch.empty_like(query_und, memory_format=torch.contiguous_format)
    num_queries = sum(share.query_lengths)
    context_und[num_queries:] = 0
    kept: list[Tensor] = []
    proteins = zip(_by_protein(query_und, key_value_tn2d, share),
                   context_und[:num_queries].split(share.query_lengths), strict=True)
    for (query, key, value), result in proteins:
        probabilities = torch.bmm(query * query.shape[-1]**-0.5, key.transpose(1, 2)).softmax(-1)
        kept.append(probabilities)
        if dropout:
            keep = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout)
            kept.append(keep)
            probabilities = probabilities * keep
        result.copy_(torch.bmm(probabilities, value).transpose(0, 1))
    return context_und, kept


def backward_by_protein(grad_und: Tensor, inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor],
                        share: Share, kept: Iterator[Tensor], has_dropout: bool) -> None:
    """Fill `gradients` of `inputs`, queries [u, n, d] and keys with values [t, n, 2, d], from that of the context.

    Those of keys and values behind the last protein, or of proteins without a query here, are left as they are.
    """
    num_queries = sum(share.query_lengths)
    gradients[0][num_queries:] = 0
    proteins = zip(_by_protein(*inputs, share), _by_protein(*gradients, share),
                   grad_und[:num_queries].split(share.query_lengths), strict=True)
    for (query, key, value), (grad_query, grad_key, grad_value), grad in proteins:
        probabilities = next(kept)
        grad_context = grad.transpose(0, 1)
        grad_probabilities = torch.bmm(grad_context, value.transpose(1, 2))
        dropped = probabilities
        if has_dropout:
            keep = next(kept)
            grad_probabilities *= keep
            dropped = probabilities * keep
        grad_value.copy_(torch.bmm(dropped.transpose(1, 2), grad_context))
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        grad_scores *= query.shape[-1]**-0.5
        grad_query.copy_(torch.bmm(grad_scores, key))
        grad_key.copy_(torch.bmm(grad_scores.transpose(1, 2), query))


def _by_protein(query_und: Tensor, key_value_tn2d: Tensor, share: Share) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of each protein: its queries here [n, queries, d], its keys and its values [n, keys, d]."""
    queries = query_und[:sum(share.query_lengths)].transpose(0, 1).split(share.query_lengths, dim=1)
    touched_tn2d = key_value_tn2d.narrow(0, share.key_start, sum(share.key_lengths))
    keys, values = (whole_tnd.transpose(0, 1).split(share.key_lengths, dim=1) for whole_tnd in touched_tn2d.unbind(2))
    return zip(queries, keys, values, strict=True)


class _ByProtein(torch.autograd.Function):
    """`forward_by_protein` of whole proteins."""

    @staticmethod
    def forward(ctx: Any, qkv_tn3d: Tensor, cu_seqlens: Tensor, num_filler: int, dropout: float) -> tuple[Tensor]:
        share = share_of(protein_lengths(cu_seqlens, num_filler), 0, len(qkv_tn3d))
        context_tnd, kept = forward_by_protein(qkv_tn3d[:, :, 0], qkv_tn3d[:, :, 1:], share, dropout)
        ctx.save_for_backward(qkv_tn3d, *kept)
        ctx.share, ctx.has_dropout = share, dropout > 0
        return (context_tnd,)

    @staticmethod
    def backward(ctx: Any, grad_tnd: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_tn3d, *kept = ctx.saved_tensors
        return _whole_gradient(grad_tnd, qkv_tn3d, ctx.share, iter(kept), ctx.has_dropout), None, None, None


def _whole_gradient(grad_tnd: Tensor, qkv_tn3d: Tensor, share: Share, kept: Iterator[Tensor],
                    has_dropout: bool) -> Tensor:
    grad_tn3d = torch.empty_like(qkv_tn3d)
    grad_tn3d[sum(share.key_lengths):] = 0
    queries, keys_values = ((tensor[:, :, 0], tensor[:, :, 1:]) for tensor in (qkv_tn3d, grad_tn3d))
    backward_by_protein(grad_tnd, queries, keys_values, share, kept, has_dropout)
    return grad_tn3d


# The same as an operator that torch.compile takes as it is; traced, each new list of lengths would compile anew. What
# the backward pass needs is one tensor, of a size that no shape tells.
@torch.library.custom_op("megatron::attention_by_protein", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _attention_by_protein(qkv_tn3d: Tensor, cu_seqlens: Tensor, num_filler: int,
                          dropout: float) -> tuple[Tensor, Tensor]:
    share = share_of(protein_lengths(cu_seqlens, num_filler), 0, len(qkv_tn3d))
    context_tnd, kept = forward_by_protein(qkv_tn3d[:, :, 0], qkv_tn3d[:, :, 1:], share, dropout)
    return context_tnd, torch.cat([qkv_tn3d.new_empty(0), *(tensor.flatten() for tensor in kept)])


@torch.library.custom_op("megatron::attention_by_protein_backward", mutates_args=())
def _attention_by_protein_backward(grad_tnd: Tensor, qkv_tn3d: Tensor, cu_seqlens: Tensor, kept: Tensor,
                                   num_filler: int, dropout: float) -> Tensor:
    lengths = protein_lengths(cu_seqlens, num_filler)
    heads = qkv_tn3d.shape[1]
    shapes = [(heads, length, length) for length in lengths for _ in range(2 if dropout else 1)]
    pieces = kept.split([heads * length * length for _, length, _ in shapes])
    views = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
    return _whole_gradient(grad_tnd, qkv_tn3d, share_of(lengths, 0, len(qkv_tn3d)), views, dropout > 0)


@_attention_by_protein.register_fake
def _(qkv_tn3d: Tensor, cu_seqlens: Tensor, num_filler: int, dropout: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv_tn3d[:, :, 0]).contiguous(), qkv_tn3d.new_empty(
        torch.library.get_ctx().new_dynamic_size())


@_attention_by_protein_backward.register_fake
def _(grad_tnd: Tensor, qkv_tn3d: Tensor, cu_seqlens: Tensor, kept: Tensor, num_filler: int,
      dropout: float) -> Tensor:
    return torch.empty_like(qkv_tn3d)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_tn3d, cu_seqlens, ctx.num_filler, ctx.dropout = inputs
    ctx.save_for_backward(qkv_tn3d, cu_seqlens, output[1])


def _go_back(ctx: Any, grad_tnd: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    gradient = _attention_by_protein_backward(grad_tnd, *ctx.saved_tensors, ctx.num_filler, ctx.dropout)
    return gradient, None, None, None


_attention_by_protein.register_autograd(_go_back, setup_context=_keep)
