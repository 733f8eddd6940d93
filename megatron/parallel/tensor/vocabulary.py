"""Embedding, logits and cross entropy of a vocabulary split over the tensor axis: no rank ever holds all logits.

The loss is one operation on hidden states that goes over the targets in chunks: logits and their gradient take the
memory of one chunk, however many targets there are. A chunk covers the micro-batches of the presets, and the last
chunk's logits are kept for the backward pass, so only larger micro-batches recompute logits. torch 2.13's
`linear_cross_entropy` cannot replace it: it supports neither a softcap nor a split vocabulary, does not return the most
likely id, and computes gradients in the forward pass, in fp16 before the loss scale is applied.

Every rank holds the same number of rows, a multiple that suits the hardware, as in Megatron-LM; rank r + 1 continues
the ids of rank r. Rows beyond those that one rank alone would have are padding, which is never used, not even by the
softmax, so that every layout computes the same.

Shapes: t tokens, u tokens of the stream on this rank, m targets, h hidden, r rows of the vocabulary on this rank, v
those among them that stand for ids, c targets of a chunk, s ranks of the axis.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron.kernels.cross_entropy import cross_entropy_reference, logits_gradient, target_statistics
from megatron.kernels.device import takes_triton
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.kernels.pointwise.product import sum_over_tokens
from megatron.parallel.collectives import all_gather, start_all_reduce, sum_gradients
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.parameters import Declaration, Initial, split_parameter, table
from megatron.parallel.tensor.layers import Matrix, linear
from megatron.parallel.tensor.stream import Stream, rows_here
from megatron.parallel.tensor.weight_gradients import added_weight_gradient

_CHUNK = 8192  # targets; with 128 ids their logits take 4 MiB in fp32


def vocabulary_parameter(shape: Sequence[int], multiple: int, axis: Axis, declaration: Declaration,
                         ends: Axis = ONE_RANK_AXIS) -> nn.Parameter:
    """A parameter of `shape` with a row for each id, split by rows over `axis`, a multiple of `multiple` on each rank.

    `ends`: the first and last pipeline rank where both hold it.
    """
    rows = -(-shape[0] // (multiple * axis.size)) * multiple
    return split_parameter(shape, 0, axis, declaration, local_size=rows, ends=ends)


class VocabularyParallelTable(Matrix):
    """An embedding table: a row of `weight` for each of `num_ids` ids, the rows split over the tensor axis."""

    def __init__(self, num_ids: int, hidden_size: int, multiple: int, stream: Stream, initial: Initial,
                 ends: Axis = ONE_RANK_AXIS) -> None:
        super().__init__()
        self.stream = stream
        self.weight = vocabulary_parameter((num_ids, hidden_size), multiple, stream.axis, table(initial), ends)

    def forward(self, ids_t: Tensor) -> Tensor:
        """The embeddings [u, h] of this rank's tokens."""
        return self.stream.leave(rows_here(self.weight, ids_t, self.stream.axis))


def vocabulary_logits(hidden_mh: Tensor, table: Matrix, bias_r: Tensor, num_ids: int, axis: Axis) -> Tensor:
    """Logits [m, v] of this rank's part of `num_ids` ids.

    Forward: no communication. Backward: the gradient of `hidden_mh` is summed over the axis.
    """
    hidden_mh = sum_gradients(hidden_mh, axis)
    return linear(hidden_mh, *_of_ids_here(table, bias_r, num_ids, axis, hidden_mh.dtype))


def vocabulary_loss(hidden_mh: Tensor, table: Matrix, bias_r: Tensor, target_ids_m: Tensor, num_ids: int, axis: Axis,
                    softcap: float | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The summed cross entropy (nats, fp32), and how many targets are the most likely id; the same on every rank.

    From the logits that `vocabulary_logits` would give, with `softcap` if there is one; each target's loss is rounded
    to `dtype`. Targets NO_TARGET do not count. Forward: four numbers per target are gathered from all ranks, once.
    Backward: the gradient of `hidden_mh` is summed over the axis, one chunk while the next one is computed.
    """
    operands = _of_ids_here(table, bias_r, num_ids, axis, hidden_mh.dtype)
    if axis.size == 1 and len(hidden_mh) <= _CHUNK and not takes_triton(hidden_mh):
        # On CPUs a small model's time goes into calls, and plain autograd makes the fewest.
        return cross_entropy_reference(linear(hidden_mh, *operands).float(), target_ids_m, softcap, dtype)
    return _LinearCrossEntropy.apply(hidden_mh, *operands, target_ids_m, axis.rank * len(bias_r), axis, softcap, dtype)


def _of_ids_here(table: Matrix, bias_r: Tensor, num_ids: int, axis: Axis,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's rows those that stand for ids: weight, weight in `dtype`, bias."""
    weight_rh: Tensor = table.weight
    matrix_rh = table.weight_in(dtype)
    num_here = min(max(num_ids - axis.rank * len(weight_rh), 0), len(weight_rh))
    if num_here == len(weight_rh):
        return weight_rh, matrix_rh, bias_r
    return weight_rh[:num_here], matrix_rh[:num_here], bias_r[:num_here]


class _LinearCrossEntropy(torch.autograd.Function):
    """`first`: this rank's first id. The weight is kept on `ctx`, for the reason given in `layers`."""

    @staticmethod
    def forward(ctx: Any, hidden_mh: Tensor, weight_vh: Tensor, matrix_vh: Tensor, bias_v: Tensor, target_ids_m: Tensor,
                first: int, axis: Axis, softcap: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shift_v, statistics = bias_v.to(hidden_mh.dtype), []
        for hidden_ch, ids_c in zip(hidden_mh.split(_CHUNK), target_ids_m.split(_CHUNK), strict=True):
            logits_cv = F.linear(hidden_ch, matrix_vh, shift_v)
            statistics.append(target_statistics(logits_cv, ids_c, first, softcap))
        logsumexp_m, target_m, is_likeliest_m = _together(statistics, target_ids_m, axis)
        ctx.save_for_backward(hidden_mh, matrix_vh, shift_v, target_ids_m, logsumexp_m, logits_cv)
        ctx.weight, ctx.bias_dtype, ctx.numbers, ctx.axis = weight_vh, bias_v.dtype, (first, softcap), axis
        num_likeliest = is_likeliest_m.sum(dtype=torch.int64)
        ctx.mark_non_differentiable(num_likeliest)
        return -target_m.to(dtype).sum(dtype=torch.float32), num_likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_mh, matrix_vh, shift_v, target_ids_m, logsumexp_m, last_cv = ctx.saved_tensors
        takes_hidden, takes_weight, _, takes_bias = ctx.needs_input_grad[:4]
        grad_mh = torch.empty_like(hidden_mh) if takes_hidden else None
        grad_weight_vh: Tensor | None = None
        grad_bias_v: Tensor | None = None
        summing = []
        for start in range(0, max(1, len(hidden_mh)), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            hidden_ch = hidden_mh[chunk]
            is_last = chunk.stop >= len(hidden_mh)
            logits_cv = last_cv if is_last else F.linear(hidden_ch, matrix_vh, shift_v)
            grad_cv = logits_gradient(logits_cv, target_ids_m[chunk], logsumexp_m[chunk], gradient, *ctx.numbers)
            if grad_mh is not None:
                torch.mm(grad_cv, matrix_vh, out=grad_mh[chunk])
                summing.append(start_all_reduce(grad_mh[chunk], ctx.axis))
            if takes_weight:
                grad_weight_vh = _sum(grad_weight_vh, added_weight_gradient(ctx.weight, grad_cv, hidden_ch))
            if takes_bias:
                grad_bias_v = _sum(grad_bias_v, sum_over_tokens(grad_cv, torch.float32))
        for each in summing:
            each.wait()
        gradients = ((grad_weight_vh, ctx.weight.dtype), (None, None), (grad_bias_v, ctx.bias_dtype))
        return grad_mh, *(None if grad is None else grad.to(dtype) for grad, dtype in gradients), *[None] * 5


def _sum(so_far: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum of two gradients of chunks, in fp32; None is 0."""
    return more if so_far is None else so_far if more is None else so_far.float() + more


def _together(of_chunks: Sequence[Sequence[Tensor]], target_ids_m: Tensor, axis: Axis) -> Sequence[Tensor]:
    """The first three statistics [m], combined over chunks and ranks; of equal maxima the first rank's counts."""
    statistics = of_chunks[0]
    if len(of_chunks) > 1:
        statistics = [torch.cat(of_each) for of_each in zip(*of_chunks, strict=True)]
    if axis.size == 1:
        return statistics[:3]
    gathered_s4m = all_gather(torch.stack(list(statistics))[None], axis)
    logsumexp_sm, target_sm, is_likeliest_sm, largest_sm = gathered_s4m.unbind(1)
    logsumexp_m = logsumexp_sm.logsumexp(0)
    target_m = (target_sm + (logsumexp_sm - logsumexp_m)).amax(0).where(target_ids_m != NO_TARGET, 0)
    return logsumexp_m, target_m, is_likeliest_sm.gather(0, largest_sm.argmax(0)[None])[0]
