"""Attention of sequences whose tokens are shared out over the context axis, for proteins too long for one device.

Rank r holds the r-th of equal slices of the tokens, and computes the contexts of its own from the keys and values of
all. Shapes: t tokens of the micro-batch, u of them on this rank, n heads, d head width.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention import (
    backward_by_protein,
    forward_by_protein,
    fused_attention,
    is_fused,
    packed_attention,
    share_of,
)
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths
from megatron.parallel.collectives import all_gather, gather_slices, reduce_scatter
from megatron.parallel.mesh import Axis


def context_attention(qkv_un3d: Tensor, sequence: PackedSequence, dropout: float, axis: Axis) -> Tensor:
    """The context [u, n, d] of this rank's tokens; on one rank `packed_attention`.

    Forward: keys and values are gathered. Backward: their gradients are summed to their owners.
    """
    if axis.size == 1:
        return packed_attention(qkv_un3d, sequence, dropout)
    if not is_fused(qkv_un3d):
        return _by_protein(qkv_un3d, sequence, dropout, axis)
    query_un1d, key_value_un2d = qkv_un3d.split([1, 2], dim=2)
    key_tnd, value_tnd = gather_slices(key_value_un2d, axis).unbind(2)
    num_queries, ends = len(qkv_un3d), sequence.cu_seqlens
    query_ends = (ends - axis.rank * num_queries).clamp(0, num_queries)
    longest = min(sequence.max_length, num_queries), sequence.max_length
    return fused_attention(query_un1d.squeeze(2), key_tnd, value_tnd, (query_ends, ends), longest, dropout)


@torch.compiler.disable  # traced, each new list of lengths would compile anew
def _by_protein(qkv_un3d: Tensor, sequence: PackedSequence, dropout: float, axis: Axis) -> Tensor:
    return _GatheredByProtein.apply(qkv_un3d, sequence, dropout, axis)


class _GatheredByProtein(torch.autograd.Function):
    """Of the keys and values only the rank's own are kept for the backward pass, which gathers all of them again."""

    @staticmethod
    def forward(ctx: Any, qkv_un3d: Tensor, sequence: PackedSequence, dropout: float, axis: Axis) -> Tensor:
        start = axis.rank * len(qkv_un3d)
        lengths = protein_lengths(sequence.cu_seqlens, sequence.num_filler)
        share = share_of(lengths, start, start + len(qkv_un3d))
        context_und, kept = forward_by_protein(qkv_un3d[:, :, 0], all_gather(qkv_un3d[:, :, 1:], axis), share, dropout)
        ctx.save_for_backward(qkv_un3d, *kept)
        ctx.share, ctx.has_dropout, ctx.axis = share, dropout > 0, axis
        return context_und

    @staticmethod
    def backward(ctx: Any, grad_und: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_un3d, *kept = ctx.saved_tensors
        key_value_tn2d = all_gather(qkv_un3d[:, :, 1:], ctx.axis)
        grad_qkv_un3d = torch.empty_like(qkv_un3d)
        # Summed over the ranks, of which each has some proteins' queries; 0 where a protein has none here.
        grad_key_value_tn2d = torch.zeros_like(key_value_tn2d)
        backward_by_protein(grad_und, (qkv_un3d[:, :, 0], key_value_tn2d),
                            (grad_qkv_un3d[:, :, 0], grad_key_value_tn2d), ctx.share, iter(kept), ctx.has_dropout)
        grad_qkv_un3d[:, :, 1:] = reduce_scatter(grad_key_value_tn2d, ctx.axis)
        return grad_qkv_un3d, None, None, None
