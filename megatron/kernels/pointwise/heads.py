"""Queries and keys before attention: each head normalised, then rotated, in one pass over memory.

The norm is over a head's width; each head has a scale [d] of its own, and no bias. The rotation ("turn" in names) is
that of `megatron.kernels.rotary`. On GPUs Triton does both, on CPUs the C++ helper; elsewhere, and where torch.compile
fuses plain functions by itself, PyTorch does.

Shapes: t tokens, g groups of heads, each with c = q + 2 rows of width d: queries, key, value; x = g·c·d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron.kernels.device import operator, takes_triton
from megatron.kernels.pointwise.native import (
    prepare_heads,
    prepare_heads_backward,
    runs_native,
    takes_native,
)
from megatron.kernels.rotary import Rotation, rotate_reference

Heads = tuple[Tensor, ...]  # the whole projection [t, g, c, d], or queries, keys and values [t, g, d] each, one a group


@dataclass(frozen=True)
class HeadScaling:
    """The norms of queries and keys: the scales of all query heads [g·q·d] and of all key heads [g·d]."""

    query_weight: Tensor
    key_weight: Tensor
    epsilon: float
    is_rms: bool


def prepared_heads(qkv_tgcd: Tensor, scaling: HeadScaling | None, rotation: Rotation | None,
                   added_bias_x: Tensor | None = None, is_apart: bool = False) -> Heads:
    """The projection with queries and keys normalised, then rotated; values as they are.

    May overwrite `qkv_tgcd`, whose values nothing else may need any more. `added_bias_x`: a bias that `qkv_tgcd`
    already contains. The forward pass does not use it; the backward pass computes its gradient, the sum of that of
    `qkv_tgcd` over the tokens. Triton's rotation without a norm alone does that. `is_apart`: Triton's kernels return
    queries, keys and values apart; their backward kernel then reads three gradients and writes one, without the copy
    by which PyTorch would put them together.
    """
    turn = (None, None) if rotation is None else (rotation.cos, rotation.sin)
    if takes_triton(qkv_tgcd) and scaling is None and rotation is not None:
        return _Turned.apply(qkv_tgcd, added_bias_x, *turn, is_apart)
    assert added_bias_x is None, "whoever added the bias computes its gradient"
    if scaling is not None:
        if takes_triton(qkv_tgcd) or takes_native(qkv_tgcd):
            return _Prepared.apply(qkv_tgcd, scaling.query_weight, scaling.key_weight, *turn, scaling.epsilon,
                                   not scaling.is_rms, is_apart)
        qkv_tgcd = normed_queries_and_keys(qkv_tgcd, scaling)
    elif rotation is not None and takes_native(qkv_tgcd):
        return _Prepared.apply(qkv_tgcd, None, None, *turn, 0.0, False, is_apart)
    return (qkv_tgcd if rotation is None else rotate_reference(qkv_tgcd, rotation),)


def normed_queries_and_keys(qkv_tgcd: Tensor, scaling: HeadScaling) -> Tensor:
    """The projection [t, g, c, d] with queries and keys normalised, by PyTorch's own functions."""
    query_tgqd, key_tg1d, value_tg1d = qkv_tgcd.split([qkv_tgcd.shape[2] - 2, 1, 1], dim=2)
    return torch.cat([normed_heads(query_tgqd, scaling.query_weight, scaling.epsilon, scaling.is_rms),
                      normed_heads(key_tg1d, scaling.key_weight, scaling.epsilon, scaling.is_rms), value_tg1d], dim=2)


def normed_heads(x_tgcd: Tensor, weight: Tensor, epsilon: float, is_rms: bool) -> Tensor:
    """Each head normalised over d and multiplied by its scale; `weight`: those of all heads in one dimension."""
    normalise = F.rms_norm if is_rms else F.layer_norm
    normed_tgcd = normalise(x_tgcd, x_tgcd.shape[-1:], eps=epsilon)
    return normed_tgcd * weight.to(x_tgcd.dtype).view(x_tgcd.shape[1:])


class _Turned(torch.autograd.Function):
    """Rotates queries and keys by Triton: in the projection's own memory, unless that is a leaf or not contiguous.

    The change is not marked by `ctx.mark_dirty`: the projection is a view here, and of a marked view autograd would
    copy the gradient. Still no one can use an overwritten projection unnoticed, for the operator raises its version,
    which autograd compares. The backward pass returns a new tensor: the gradient that it gets may have other uses.
    """

    @staticmethod
    def forward(ctx: Any, qkv_tgcd: Tensor, added_bias_x: Tensor | None, cos: Tensor, sin: Tensor,
                is_apart: bool) -> Heads:
        ctx.save_for_backward(cos, sin)
        ctx.bias_dtype = None if added_bias_x is None else added_bias_x.dtype
        if (qkv_tgcd.is_leaf and qkv_tgcd.requires_grad) or not qkv_tgcd.is_contiguous():
            qkv_tgcd = _prepare(qkv_tgcd, None, None, cos, sin, 0.0, False)
        else:
            _turn_(qkv_tgcd, cos, sin)
        return qkv_tgcd.unbind(2) if is_apart else (qkv_tgcd,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        has_sum = ctx.needs_input_grad[1]
        grad_qkv_tgcd, sum_gcd = _turn_back(grads, *ctx.saved_tensors, has_sum)
        grad_bias_x = sum_gcd.flatten().to(ctx.bias_dtype) if has_sum else None
        return grad_qkv_tgcd, grad_bias_x, None, None, None


class _Prepared(torch.autograd.Function):
    """Normalises and rotates queries and keys; keeps its input, and normalises it again in the backward pass.

    Without scales it only rotates, by the C++ helper, and keeps the rotation alone.
    """

    @staticmethod
    def forward(ctx: Any, qkv_tgcd: Tensor, query_weight: Tensor | None, key_weight: Tensor | None,
                cos: Tensor | None, sin: Tensor | None, epsilon: float, has_mean: bool, is_apart: bool) -> Heads:
        ctx.save_for_backward(None if query_weight is None else qkv_tgcd, query_weight, key_weight, cos, sin)
        ctx.numbers = epsilon, has_mean
        out_tgcd = _prepare(qkv_tgcd, query_weight, key_weight, cos, sin, epsilon, has_mean)
        return out_tgcd.unbind(2) if is_apart else (out_tgcd,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_tgcd, query_weight, key_weight, cos, sin = ctx.saved_tensors
        if query_weight is None:
            return prepare_heads(grads[0], None, None, cos, sin, 0.0, False, -1), *[None] * 7
        grad_qkv_tgcd, grads_x = _prepare_backward(grads, qkv_tgcd, query_weight, key_weight, cos, sin, *ctx.numbers)
        of_queries, of_keys = grads_x.to(query_weight.dtype).split([len(query_weight), len(key_weight)])
        return grad_qkv_tgcd, of_queries, of_keys, None, None, None, None, None


# An operator in every call: as one it raises the version of what it overwrites.
@torch.library.custom_op("megatron::turn_heads_", mutates_args=("qkv_tgcd",))
def _turn_(qkv_tgcd: Tensor, cos: Tensor, sin: Tensor) -> None:
    from megatron.kernels.pointwise.heads_triton import launch_forward

    launch_forward(qkv_tgcd, None, None, cos, sin, 0.0, False, qkv_tgcd)


@_turn_.register_fake
def _(qkv_tgcd: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


@operator("prepare_heads", lambda qkv_tgcd, *_: qkv_tgcd.new_empty(qkv_tgcd.shape))
def _prepare(qkv_tgcd: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
             sin: Tensor | None, epsilon: float, has_mean: bool) -> Tensor:
    if runs_native(qkv_tgcd):
        return prepare_heads(qkv_tgcd, query_weight, key_weight, cos, sin, epsilon, has_mean, 1)
    from megatron.kernels.pointwise.heads_triton import launch_forward

    qkv_tgcd = qkv_tgcd.contiguous()
    out_tgcd = torch.empty_like(qkv_tgcd)
    launch_forward(qkv_tgcd, query_weight, key_weight, cos, sin, epsilon, has_mean, out_tgcd)
    return out_tgcd


def _empty_whole(grads: Sequence[Tensor]) -> Tensor:
    """An empty tensor for the projection's gradient [t, g, c, d]; `grads` as in `_turn_back`."""
    shape = grads[0].shape if len(grads) == 1 else (*grads[0].shape[:2], len(grads), grads[0].shape[2])
    return grads[0].new_empty(shape)


def _empty_turned_back(grads: Sequence[Tensor], cos: Tensor, sin: Tensor, has_sum: bool) -> tuple[Tensor, Tensor]:
    whole_tgcd = _empty_whole(grads)
    return whole_tgcd, whole_tgcd.new_empty(whole_tgcd.shape[1:] if has_sum else 0, dtype=torch.float32)


@operator("turn_heads_back", _empty_turned_back)
def _turn_back(grads: Sequence[Tensor], cos: Tensor, sin: Tensor, has_sum: bool) -> tuple[Tensor, Tensor]:
    """The gradient of the projection before its rotation [t, g, c, d], and if `has_sum` its sum over t, fp32 [g, c, d].

    `grads`: the gradient of the rotated projection, or those of queries, keys and values [t, g, d].
    """
    from megatron.kernels.pointwise.heads_triton import launch_turn_back

    grads = [grad.contiguous() for grad in grads]
    grad_qkv_tgcd = _empty_whole(grads)
    return grad_qkv_tgcd, launch_turn_back(grads, cos, sin, has_sum, grad_qkv_tgcd)


@operator("prepare_heads_backward", lambda grads, qkv_tgcd, query_weight, key_weight, *_: (
    qkv_tgcd.new_empty(qkv_tgcd.shape), qkv_tgcd.new_empty(len(query_weight) + len(key_weight), dtype=torch.float32)))
def _prepare_backward(grads: Sequence[Tensor], qkv_tgcd: Tensor, query_weight: Tensor, key_weight: Tensor,
                      cos: Tensor | None, sin: Tensor | None, epsilon: float,
                      has_mean: bool) -> tuple[Tensor, Tensor]:
    """The gradient of the projection [t, g, c, d], and fp32 those of the queries' scales, then of the keys', in one.

    `grads` as in `_turn_back`.
    """
    if runs_native(qkv_tgcd):
        return prepare_heads_backward(grads[0], qkv_tgcd, query_weight, key_weight, cos, sin, epsilon, has_mean)
    from megatron.kernels.pointwise.heads_triton import launch_backward

    grads, qkv_tgcd = [grad.contiguous() for grad in grads], qkv_tgcd.contiguous()
    grad_qkv_tgcd = torch.empty_like(qkv_tgcd)
    return grad_qkv_tgcd, launch_backward(grads, qkv_tgcd, query_weight, key_weight, cos, sin, epsilon, has_mean,
                                          grad_qkv_tgcd)
