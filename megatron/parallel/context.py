"""Attention of sequences whose tokens are shared out over the context axis, for proteins too long for one device.

Rank r holds the r-th of equal slices of the tokens, and computes the contexts of its own from the keys and values of
all. Shapes: t tokens of the micro-batch, u of them on this rank, n heads in g groups of q, d head width; for each group
c = q + 2 rows: its queries, its key, its value; f features.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention.backends import BACKENDS, choose
from megatron.kernels.attention.by_protein import ProteinPass, Window
from megatron.kernels.attention.fused import varlen_attention
from megatron.kernels.attention.native import NativePass
from megatron.kernels.attention.packed import packed_attention
from megatron.kernels.dropout import Dropout
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths
from megatron.kernels.pointwise.heads import Heads
from megatron.parallel.collectives import all_gather, gather_slices, reduce_scatter
from megatron.parallel.mesh import Axis


def context_attention(heads: Heads, sequence: PackedSequence, dropout: Dropout | None, axis: Axis,
                      window: Window = None, backend: str = "auto") -> Tensor:
    """The context [u, n, d] of this rank's tokens; on one rank `packed_attention`, which alone takes a `backend`, or
    where `takes_parts` and they are given apart `varlen_attention`.

    Forward: keys and values are gathered. Backward: their gradients are summed to their owners.
    """
    if len(heads) > 1:
        return varlen_attention(heads, sequence, window=window)
    [qkv_ugcd] = heads
    if axis.size == 1:
        return packed_attention(qkv_ugcd, sequence, dropout, window, backend)
    name = choose(qkv_ugcd, dropout is not None, window, False, backend)
    if name in ("compiled", "plain"):
        return _gathered(qkv_ugcd, sequence, dropout, axis, window, NativePass if name == "compiled" else ProteinPass)
    query_ugqd, key_value_ug2d = qkv_ugcd.split([qkv_ugcd.shape[2] - 2, 2], dim=2)
    key_value_tg2d = gather_slices(key_value_ug2d, axis)
    return BACKENDS[name].run(query_ugqd, sequence, dropout, window, key_value_tg2d, axis.rank * len(qkv_ugcd))


def takes_parts(qkv_ugcd: Tensor, has_dropout: bool, axis: Axis, window: Window = None, backend: str = "auto") -> bool:
    """Whether `context_attention` is best given queries, keys and values apart, as PyTorch's varlen_attn takes them.

    Not where torch.compile fuses by itself what puts their gradients together.
    """
    return (axis.size == 1 and not torch.compiler.is_compiling()
            and choose(qkv_ugcd, has_dropout, window, backend=backend) == "varlen")


def with_neighbours(x_uf: Tensor, num_neighbours: int, axis: Axis) -> Tensor:
    """This rank's tokens between so many of the rank before and of the rank behind, [u + 2 · neighbours, f].

    Before the first and behind the last token of all there are zeros; one rank has no neighbours, [u, f]. Forward: each
    rank's first and last tokens are gathered. Backward: their gradients are summed to their owners.
    """
    if axis.size == 1:
        return x_uf
    edge = x_uf.new_zeros(num_neighbours, *x_uf.shape[1:])
    assert len(x_uf) >= num_neighbours, "neighbours lie on the next rank"
    edges = gather_slices(torch.cat([x_uf[:num_neighbours], x_uf[-num_neighbours:]]), axis).split(num_neighbours)
    before = edges[2 * axis.rank - 1] if axis.rank else edge
    behind = edges[2 * axis.rank + 2] if axis.rank + 1 < axis.size else edge
    return torch.cat([before, x_uf, behind])


# Traced, each new list of lengths would compile anew. This is torch.compiler.disable, but for importing torch._dynamo,
# which takes as long as importing torch, only when it is first called.
@torch._disable_dynamo
def _gathered(qkv_ugcd: Tensor, sequence: PackedSequence, dropout: Dropout | None, axis: Axis, window: Window,
              kind: type[NativePass | ProteinPass]) -> Tensor:
    return _GatheredAttention.apply(qkv_ugcd, sequence, dropout, axis, window, kind).flatten(1, 2)


class _GatheredAttention(torch.autograd.Function):
    """Of the keys and values only the rank's own are kept for the backward pass, which gathers all of them again."""

    @staticmethod
    def forward(ctx: Any, qkv_ugcd: Tensor, sequence: PackedSequence, dropout: Dropout | None, axis: Axis,
                window: Window, kind: type[NativePass | ProteinPass]) -> Tensor:
        qkv_ugcd = qkv_ugcd.contiguous()
        lengths = protein_lengths(sequence.cu_seqlens, sequence.num_filler)
        ctx.axis, ctx.going = axis, kind(lengths, axis.rank * len(qkv_ugcd), len(qkv_ugcd), window, dropout)
        context_ugqd, *made = ctx.going.forward(qkv_ugcd[:, :, :-2], all_gather(qkv_ugcd[:, :, -2:], axis))
        ctx.save_for_backward(qkv_ugcd, context_ugqd, *made)
        return context_ugqd

    @staticmethod
    def backward(ctx: Any, grad_ugqd: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv_ugcd, *made = ctx.saved_tensors
        key_value_tg2d = all_gather(qkv_ugcd[:, :, -2:], ctx.axis)
        grad_qkv_ugcd = torch.empty_like(qkv_ugcd)
        # Summed over the ranks, of which each has some proteins' queries; 0 where a protein has none here.
        grad_key_value_tg2d = torch.zeros_like(key_value_tg2d)
        ctx.going.backward(grad_ugqd, (qkv_ugcd[:, :, :-2], key_value_tg2d),
                           (grad_qkv_ugcd[:, :, :-2], grad_key_value_tg2d), made)
        grad_qkv_ugcd[:, :, -2:] = reduce_scatter(grad_key_value_tg2d, ctx.axis)
        return grad_qkv_ugcd, None, None, None, None, None
