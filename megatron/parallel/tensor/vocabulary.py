"""Embedding, logits and cross entropy of a vocabulary split over the tensor axis: no rank ever sees all logits.

Each rank holds as many rows, a multiple of a number that suits the hardware, as in Megatron-LM; ids are numbered on
from rank to rank. The rows at the end that are more than one rank would have are never used, not by the softmax either,
so that every layout computes the same.

Shapes: t tokens, u tokens of the stream on this rank, m targets, h hidden, r rows of the vocabulary on this rank, v
those among them that stand for ids.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.kernels.packed_sequence import NO_TARGET
from megatron.parallel.collectives import all_gather, all_reduce_sum, sum_gradients
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import Declaration, Initial, split_parameter, table
from megatron.parallel.tensor.layers import Matrix, linear
from megatron.parallel.tensor.stream import Stream, rows_here

_ONE_RANK = Axis()


def vocabulary_parameter(shape: Sequence[int], multiple: int, axis: Axis, declaration: Declaration,
                         ends: Axis = _ONE_RANK) -> nn.Parameter:
    """A parameter of `shape` with a row for each id, the rows split over `axis`: a multiple of `multiple` on each.

    The `ends` are the pipeline ranks that both hold it.
    """
    rows = -(-shape[0] // (multiple * axis.size)) * multiple
    return split_parameter(shape, 0, axis, declaration, local_size=rows, ends=ends)


class VocabularyParallelTable(Matrix):
    """A row of `weight` for each of `num_ids` ids, the rows split over the tensor axis."""

    def __init__(self, num_ids: int, hidden_size: int, multiple: int, stream: Stream, initial: Initial,
                 ends: Axis = _ONE_RANK) -> None:
        super().__init__()
        self.stream = stream
        self.weight = vocabulary_parameter((num_ids, hidden_size), multiple, stream.axis, table(initial), ends)

    def forward(self, ids_t: Tensor) -> Tensor:
        """[u, h]."""
        return self.stream.leave(rows_here(self.weight, ids_t, self.stream.axis))


def vocabulary_logits(hidden_mh: Tensor, table: Matrix, bias_r: Tensor, num_ids: int, axis: Axis) -> Tensor:
    """Logits [m, v] of this rank's part of `num_ids` ids. Forward: no communication. Backward: `hidden_mh`'s gradient
    is summed over the axis."""
    hidden_mh = sum_gradients(hidden_mh, axis)
    weight_rh: Tensor = table.weight
    matrix_rh = table.weight_in(hidden_mh.dtype)
    num_here = min(max(num_ids - axis.rank * len(weight_rh), 0), len(weight_rh))
    if num_here < len(weight_rh):
        weight_rh, matrix_rh, bias_r = weight_rh[:num_here], matrix_rh[:num_here], bias_r[:num_here]
    return linear(hidden_mh, weight_rh, matrix_rh, bias_r)


def vocabulary_cross_entropy(logits_mv: Tensor, target_ids_m: Tensor, rows_a_rank: int,
                             axis: Axis) -> tuple[Tensor, Tensor]:
    """The summed cross entropy (nats, fp32) and how many targets are the likeliest id, on every rank alike.

    What has the id NO_TARGET counts as nothing.

    Rank i's logits are those of the ids from `i * rows_a_rank` on. Forward: the largest logits are gathered, sums of
    exponentials and the targets' logits summed over the axis. Backward: no communication.
    """
    if axis.size == 1:
        # Each target's loss is in the logits' dtype, their sum is not: in fp16 it would end at 65,504.
        loss_m = F.cross_entropy(logits_mv, target_ids_m, reduction="none", ignore_index=NO_TARGET)
        loss = loss_m.sum(dtype=torch.float32)
        return loss, (logits_mv.detach().argmax(-1) == target_ids_m).sum()
    is_target_m = target_ids_m != NO_TARGET
    target_ids_m = target_ids_m - axis.rank * rows_a_rank
    largest_m, is_likeliest_m = _largest(logits_mv.detach().float(), target_ids_m, axis)
    loss = _CrossEntropy.apply(logits_mv, target_ids_m, is_target_m, largest_m, axis)
    return loss, (is_likeliest_m & is_target_m).sum()


def _largest(logits_mv: Tensor, target_ids_m: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The largest logit of all ranks [m], and whether it is first reached at the target [m]."""
    if logits_mv.shape[1]:
        largest_m, ids_m = logits_mv.max(-1)
    else:
        largest_m = logits_mv.new_full(logits_mv.shape[:1], float("-inf"))
        ids_m = torch.zeros_like(target_ids_m)
    is_target_m = (ids_m == target_ids_m).float()
    gathered_s2m = all_gather(torch.stack([largest_m, is_target_m])[None], axis)
    largest_m, winner_m = gathered_s2m[:, 0].max(0)
    return largest_m, gathered_s2m[:, 1].gather(0, winner_m[None])[0] > 0


class _CrossEntropy(torch.autograd.Function):
    """-log softmax at the target, summed; `target_ids_m` counts from this rank's first id."""

    @staticmethod
    def forward(ctx: Any, logits_mv: Tensor, target_ids_m: Tensor, is_target_m: Tensor, largest_m: Tensor,
                axis: Axis) -> Tensor:
        num_ids = logits_mv.shape[1]
        shifted_mv = logits_mv.float() - largest_m[:, None]
        is_here_m = (target_ids_m >= 0) & (target_ids_m < num_ids)
        ids_m = target_ids_m.masked_fill(~is_here_m, 0)
        targets_m = shifted_mv.new_zeros(len(ids_m))
        if num_ids:
            targets_m = shifted_mv.gather(1, ids_m[:, None])[:, 0].masked_fill(~is_here_m, 0)
        exponentials_mv = shifted_mv.exp_()
        sums_m, targets_m = all_reduce_sum(torch.stack([exponentials_mv.sum(-1), targets_m]), axis)
        probabilities_mv = exponentials_mv.div_(sums_m[:, None]).masked_fill_(~is_target_m[:, None], 0)
        ctx.save_for_backward(probabilities_mv, ids_m, is_here_m & is_target_m)
        ctx.dtype = logits_mv.dtype
        return (sums_m.log() - targets_m).masked_fill(~is_target_m, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities_mv, ids_m, is_here_m = ctx.saved_tensors
        grad_mv = probabilities_mv.clone()
        if grad_mv.shape[1]:
            grad_mv.scatter_add_(1, ids_m[:, None], -is_here_m.float()[:, None])
        return grad_mv.mul_(gradient).to(ctx.dtype), None, None, None, None
