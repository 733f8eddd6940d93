"""Attention inside each protein of a packed row: no residue sees another protein.

Shapes: t flat tokens of all proteins of a micro-batch, n heads, d head width, g proteins. Queries, keys and values come
as one tensor `qkv_tn3d`, as the fused projection makes it. Scores are scaled by 1/sqrt(d); softmax is in fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Boundaries:
    """Where proteins begin and end among flat tokens.

    `cu_seqlens` int32 [g + 1] on the device: protein i is `cu_seqlens[i]:cu_seqlens[i+1]`. `lengths`: the same on the
    host, so that no step waits for the device.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]


def packed_attention(qkv_tn3d: Tensor, boundaries: Boundaries, dropout: float) -> Tensor:
    """The context [t, n, d] of each token; `dropout` is the rate on the probabilities (0 outside training)."""
    width = qkv_tn3d.shape[-1]
    if qkv_tn3d.is_cuda and qkv_tn3d.dtype != torch.float32 and width % 8 == 0 and width <= 256:
        return _flash(qkv_tn3d, boundaries, dropout)
    return _ProteinByProtein.apply(qkv_tn3d, boundaries.lengths, dropout)


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


def _flash(qkv_tn3d: Tensor, boundaries: Boundaries, dropout: float) -> Tensor:
    # The public torch.nn.attention.varlen has no dropout (torch 2.13); this operator under it has.
    longest = max(boundaries.lengths, default=0)
    query_tnd, key_tnd, value_tnd = qkv_tn3d.unbind(2)
    ends = boundaries.cu_seqlens
    return torch.ops.aten._flash_attention_forward(query_tnd, key_tnd, value_tnd, ends, ends, longest, longest, dropout,
                                                   False, False)[0]


class _ProteinByProtein(torch.autograd.Function):
    """Two matrix products and a softmax a protein. On CPUs faster than any fused path (see benchmarks/RESULTS.md)."""

    @staticmethod
    def forward(ctx, qkv_tn3d: Tensor, lengths: tuple[int, ...], dropout: float) -> Tensor:
        """Context [t, n, d]; keeps the probabilities [n, length, length] of each protein for the backward pass."""
        tokens, heads, _, width = qkv_tn3d.shape
        context_tnd = qkv_tn3d.new_empty(tokens, heads, width)
        saved: list[Tensor] = []
        for protein, context in zip(_by_protein(qkv_tn3d, lengths), context_tnd.split(lengths), strict=True):
            query, key, value = protein
            scores = torch.bmm(query * width**-0.5, key.transpose(1, 2))
            probabilities = scores.softmax(-1)
            saved.append(probabilities)
            if dropout:
                keep = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout)
                saved.append(keep)
                probabilities = probabilities * keep
            context.copy_(torch.bmm(probabilities, value).transpose(0, 1))
        ctx.save_for_backward(qkv_tn3d, *saved)
        ctx.lengths, ctx.has_dropout = lengths, bool(dropout)
        return context_tnd

    @staticmethod
    def backward(ctx, grad_tnd: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `qkv_tn3d`, [t, n, 3, d]."""
        qkv_tn3d, *saved = ctx.saved_tensors
        grad_qkv_tn3d = torch.empty_like(qkv_tn3d)
        scale = qkv_tn3d.shape[-1] ** -0.5
        kept = iter(saved)
        proteins = zip(_by_protein(qkv_tn3d, ctx.lengths), _by_protein(grad_qkv_tn3d, ctx.lengths),
                       grad_tnd.split(ctx.lengths), strict=True)
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
            grad_scores *= scale
            grad_query.copy_(torch.bmm(grad_scores, key))
            grad_key.copy_(torch.bmm(grad_scores.transpose(1, 2), query))
        return grad_qkv_tn3d, None, None


def _by_protein(qkv_tn3d: Tensor, lengths: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Views (query, key, value) of each protein, each [n, length, d]."""
    return [protein.permute(2, 1, 0, 3).unbind(0) for protein in qkv_tn3d.split(lengths)]
