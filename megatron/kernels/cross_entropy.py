"""What cross entropy needs of logits, and their gradient: one pass over memory each on GPUs, in fp32 everywhere.

The logits are those of a part of the ids, `first` on: of one rank, where the vocabulary is split. What a rank finds out
about them, `target_statistics`, is put together by who knows the ranks (`megatron.parallel.tensor.vocabulary`). What
has the id NO_TARGET counts as nothing, and has no gradient. With a softcap c a logit x is c·tanh(x / c) (Gemma 2, arXiv
2408.00118). Shapes: c targets of a chunk, v ids of the part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.kernels.device import operator, takes_triton
from megatron.kernels.packed_sequence import NO_TARGET


def softcapped(logits_cv: Tensor, softcap: float | None) -> Tensor:
    """The logits [c, v] with the softcap applied, in fp32; unchanged without one."""
    return logits_cv if softcap is None else softcap * torch.tanh(logits_cv.float() / softcap)


def target_statistics(logits_cv: Tensor, ids_c: Tensor, first: int, softcap: float | None) -> Sequence[Tensor]:
    """Four fp32 numbers for each target, each [c]: with those of the other parts enough for its loss.

    They are the logsumexp of the logits here; the target's log-probability among these, -inf where the target's id is
    in another part; 1 where the first of the largest logits is the target's, else 0; and the largest logit. Where the
    id is NO_TARGET the second and third are 0.
    """
    if takes_triton(logits_cv):
        return _statistics(logits_cv, ids_c, first, softcap).unbind()
    num_ids = logits_cv.shape[1]
    if not num_ids:
        nothing_c = logits_cv.new_full(ids_c.shape, -torch.inf, dtype=torch.float32)
        return nothing_c, nothing_c.where(ids_c != NO_TARGET, 0), torch.zeros_like(nothing_c), nothing_c
    logits_cv = softcapped(logits_cv, softcap).float()
    largest_c, winners_c = logits_cv.max(-1)
    shares_cv = logits_cv.log_softmax(-1)
    logsumexp_c = logits_cv[:, 0] - shares_cv[:, 0]
    places_c = ids_c - first
    inside_c = places_c.clamp(0, num_ids - 1)
    target_c = shares_cv.gather(1, inside_c[:, None])[:, 0].where(inside_c == places_c, -torch.inf)
    return logsumexp_c, target_c.where(ids_c != NO_TARGET, 0), (winners_c == places_c).float(), largest_c


def logits_gradient(logits_cv: Tensor, ids_c: Tensor, logsumexp_c: Tensor, gradient: Tensor, first: int,
                    softcap: float | None) -> Tensor:
    """The gradient of the logits [c, v], in their dtype; `gradient` is that of the summed loss (fp32, one number).

    `logsumexp_c`: over the logits of all parts.
    """
    if takes_triton(logits_cv):
        return _gradient(logits_cv, ids_c, logsumexp_c, gradient, first, softcap)
    capped_cv, num_ids = softcapped(logits_cv, softcap).float(), logits_cv.shape[1]
    grad_cv = (capped_cv - logsumexp_c[:, None]).exp_()
    if num_ids:
        places_c = ids_c - first
        inside_c = places_c.clamp(0, num_ids - 1)
        grad_cv.scatter_add_(1, inside_c[:, None], (inside_c == places_c).float().neg_()[:, None])
    grad_cv.mul_(gradient.where(ids_c != NO_TARGET, 0)[:, None])
    if softcap is not None:
        grad_cv.mul_(1 - (capped_cv / softcap).square_())
    return grad_cv.to(logits_cv.dtype)


def cross_entropy_reference(logits_mv: Tensor, ids_m: Tensor, softcap: float | None,
                            dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The summed cross entropy (nats) and how many targets are the likeliest id: by PyTorch's own functions.

    Each target's loss is rounded to `dtype`, if one is given.
    """
    capped_mv = logits_mv if softcap is None else softcap * torch.tanh(logits_mv / softcap)
    loss_m = F.cross_entropy(capped_mv, ids_m, reduction="none", ignore_index=NO_TARGET)
    return (loss_m if dtype is None else loss_m.to(dtype).to(loss_m.dtype)).sum(), (
        capped_mv.detach().argmax(-1) == ids_m).sum()


@operator("cross_entropy", lambda logits_cv, *_: _empty_statistics(logits_cv))
def _statistics(logits_cv: Tensor, ids_c: Tensor, first: int, softcap: float | None) -> Tensor:
    from megatron.kernels.cross_entropy_triton import launch_forward

    logits_cv, statistics_4c = logits_cv.contiguous(), _empty_statistics(logits_cv)
    launch_forward(logits_cv, ids_c, first, softcap, statistics_4c)
    return statistics_4c


@operator("cross_entropy_backward", lambda logits_cv, *_: logits_cv.new_empty(logits_cv.shape))
def _gradient(logits_cv: Tensor, ids_c: Tensor, logsumexp_c: Tensor, gradient: Tensor, first: int,
              softcap: float | None) -> Tensor:
    from megatron.kernels.cross_entropy_triton import launch_backward

    logits_cv, grad_cv = logits_cv.contiguous(), logits_cv.new_empty(logits_cv.shape)
    launch_backward(logits_cv, ids_c, logsumexp_c, gradient, first, softcap, grad_cv)
    return grad_cv


def _empty_statistics(logits_cv: Tensor) -> Tensor:
    return logits_cv.new_empty((4, len(logits_cv)), dtype=torch.float32)
