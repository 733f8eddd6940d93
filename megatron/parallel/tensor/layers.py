"""Layers with fp32 parameters that compute in the dtype of their input, whole or split over the tensor axis.

The cast is part of the graph, so a weight's gradient arrives in fp32 whatever the activations are in. Weights are born
without values: what those are to be, `initial`, is declared with each. Shapes: t tokens of the micro-batch, u tokens of
the stream on this rank (t, or fewer with sequence parallelism), i and o features in and out, of which each rank has its
share where split.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.parallel.parameters import (
    BIAS,
    SCALE,
    Initial,
    matrix,
    replicated_parameter,
    split_parameter,
    table,
    whole_parameter,
)
from megatron.parallel.pipeline.deferral import WeightGradients, weight_gradient
from megatron.parallel.tensor.stream import ONE_RANK, Stream


class Linear(nn.Module):
    """`x Wᵀ + b` on x [..., in_features] in x's dtype; whole on every rank."""

    def __init__(self, in_features: int, out_features: int, initial: Initial) -> None:
        super().__init__()
        self.weight = whole_parameter((out_features, in_features), matrix(initial))
        self.bias = whole_parameter((out_features,), BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ColumnParallelLinear(nn.Module):
    """A linear layer from the residual stream whose output features are split over the tensor axis."""

    def __init__(self, in_features: int, out_features: int, stream: Stream, initial: Initial) -> None:
        super().__init__()
        self.stream = stream
        self.deferral: WeightGradients | None = None
        self.weight = split_parameter((out_features, in_features), 0, stream.axis, matrix(initial))
        self.bias = split_parameter((out_features,), 0, stream.axis, BIAS)

    def forward(self, x_ui: Tensor) -> Tensor:
        """[t, o], this rank's features of all tokens."""
        return _Linear.apply(x_ui, self.weight, self.bias, self.stream, self.deferral)


class RowParallelLinear(nn.Module):
    """A linear layer back into the residual stream whose input features are split over the tensor axis."""

    def __init__(self, in_features: int, out_features: int, stream: Stream, initial: Initial) -> None:
        super().__init__()
        self.stream = stream
        self.deferral: WeightGradients | None = None
        self.weight = split_parameter((out_features, in_features), 1, stream.axis, matrix(initial))
        self.bias = replicated_parameter((out_features,), stream.axis, BIAS, has_partial_gradient=True)

    def forward(self, x_ti: Tensor) -> Tensor:
        """[u, o], all features of this rank's tokens."""
        # The first rank alone adds the bias, inside its matrix product, and so gets the bias' whole gradient.
        bias_o = self.bias if self.stream.axis.rank == 0 else self.bias * 0
        return self.stream.leave(_Linear.apply(x_ti, self.weight, bias_o, ONE_RANK, self.deferral))


class Table(nn.Module):
    """A row of `weight` [num_rows, h] for each id of this rank's tokens; whole on every rank."""

    def __init__(self, num_rows: int, hidden_size: int, stream: Stream, initial: Initial) -> None:
        super().__init__()
        self.weight = stream.parameter((num_rows, hidden_size), table(initial))

    def forward(self, ids_u: Tensor) -> Tensor:
        """[u, h]."""
        return F.embedding(ids_u, self.weight)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al., 2016, biased variance); statistics in fp32."""

    def __init__(self, width: int, epsilon: float, stream: Stream) -> None:
        super().__init__()
        self.weight = stream.parameter((width,), SCALE)
        self.bias = stream.parameter((width,), BIAS)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as `x`."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.epsilon)


class _Linear(torch.autograd.Function):
    """Forward: all tokens of the stream are gathered and multiplied. Backward: the input's gradient is summed.

    With sequence parallelism only this rank's tokens are kept, and gathered again in the backward pass. There each
    collective runs while a matrix product does that does not need it. Of the weight the parameter itself is kept, and
    cast again: a copy in half precision would be kept once for each micro-batch under way. It is not among the saved
    tensors, for which torch.utils.checkpoint gives back others, not the leaf to which a gradient is to be added.
    """

    @staticmethod
    def forward(ctx: Any, x_ui: Tensor, weight_oi: Tensor, bias_o: Tensor, stream: Stream,
                deferral: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(x_ui)
        ctx.weight_oi, ctx.stream, ctx.deferral, ctx.bias_dtype = weight_oi, stream, deferral, bias_o.dtype
        return F.linear(stream.start_enter(x_ui).wait(), weight_oi.to(x_ui.dtype), bias_o.to(x_ui.dtype))

    @staticmethod
    def backward(ctx: Any, grad_to: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        (x_ui,), weight_oi = ctx.saved_tensors, ctx.weight_oi
        gathering = ctx.stream.start_enter(x_ui)
        grad_ti = grad_to @ weight_oi.to(grad_to.dtype)
        x_ti = gathering.wait()
        summing = ctx.stream.start_leave(grad_ti)
        is_put_off = ctx.deferral is not None and ctx.deferral.takes(weight_oi, grad_to, x_ti)
        grad_weight_oi = None if is_put_off else weight_gradient(weight_oi, grad_to, x_ti)
        grad_bias_o = grad_to.sum(0, dtype=ctx.bias_dtype)
        return summing.wait(), grad_weight_oi, grad_bias_o, None, None
