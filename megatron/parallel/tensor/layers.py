"""Layers with fp32 parameters that compute in the dtype of their input, whole or split over the tensor axis.

The cast is part of the graph, so a weight's gradient is fp32 whatever the activations' dtype. Weights are created
without values; their declaration says by `initial` what to fill them with. Shapes: t tokens of the micro-batch, u
tokens of the stream on this rank (t, or fewer with sequence parallelism), i and o features in and out, of which a split
layer has this rank's part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.kernels.device import takes_triton
from megatron.kernels.fp8 import Recipe
from megatron.kernels.pointwise.activation import adds_biases
from megatron.kernels.pointwise.product import Product, sum_over_tokens
from megatron.parallel.parameters import BIAS, Initial, matrix, replicated_parameter, split_parameter, table
from megatron.parallel.tensor.fp8 import Amaxes, Operands, fp8_products, weight_operands
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.parallel.tensor.weight_gradients import WeightGradients, weight_gradient


class Matrix(nn.Module):
    """A layer with an fp32 `weight`, and perhaps a `bias`, that multiplies in a lower precision."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        # Weight and bias in the compute dtype, kept up to date by `copies`; None: cast in every forward pass.
        self.copy: Tensor | None = None
        self.bias_copy: Tensor | None = None
        # Of split layers alone: with a recipe products are in FP8, `fp8_copy` replaces `copy`, and with delayed scaling
        # `amax_history` renews the amaxes between steps.
        self.recipe: Recipe | None = None
        self.fp8_copy: Operands | None = None
        self.amaxes = Amaxes()
        self.adapters: nn.Module | None = None  # LoRA's (`adapters`), of split layers alone

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, detached."""
        return self.copy if self.copy is not None and self.copy.dtype == dtype else self.weight.detach().to(dtype)

    def adapted(self, output: Tensor, x: Tensor) -> Tensor:
        """`output`, the layer's for input `x`, plus that of its adapters, if it has any."""
        return output if self.adapters is None else output + self.adapters(x)


class Linear(Matrix):
    """`x Wᵀ + b` on this rank's tokens x [u, i], in x's dtype; the weight is whole on every rank."""

    def __init__(self, in_features: int, out_features: int, initial: Initial, has_bias: bool = True,
                 stream: Stream = ONE_RANK_STREAM) -> None:
        super().__init__()
        self.weight = stream.parameter((out_features, in_features), matrix(initial))
        self.bias = stream.parameter((out_features,), BIAS) if has_bias else None

    def forward(self, x_ui: Tensor) -> Tensor:
        """[u, o]."""
        return linear(x_ui, self.weight, self.weight_in(x_ui.dtype), self.bias, self.bias_copy)


class ColumnParallelLinear(Matrix):
    """A linear layer from the residual stream whose output features are split over the tensor axis.

    `runs`: if it is several layers in one with interleaved features, how many features of each follow each other.
    """

    def __init__(self, in_features: int, out_features: int, stream: Stream, initial: Initial,
                 has_bias: bool = True, runs: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.stream = stream
        self.deferral: WeightGradients | None = None
        self.weight = split_parameter((out_features, in_features), 0, stream.axis, matrix(initial, runs))
        self.bias = split_parameter((out_features,), 0, stream.axis, BIAS) if has_bias else None

    def forward(self, x_ui: Tensor, trains_bias: bool = True) -> Tensor:
        """[t, o], this rank's features of all tokens. Not `trains_bias`: the caller computes the bias' gradient."""
        bias_o = self.bias if self.bias is None or trains_bias else self.bias.detach()
        if self.recipe is not None:
            return self.adapted(_in_fp8(x_ui, [self], [bias_o], entry=self.stream)[0], x_ui)
        product_to = linear(x_ui, self.weight, self.weight_in(x_ui.dtype), bias_o, self.bias_copy, self.stream,
                            self.deferral)
        return self.adapted(product_to, x_ui)

    def product(self, x_ui: Tensor) -> Product:
        """The output, and the bias if that is left to the kernel that follows, which then adds it; else None."""
        return products_together(x_ui, self)[0]


class RowParallelLinear(Matrix):
    """A linear layer back into the residual stream whose input features are split over the tensor axis."""

    def __init__(self, in_features: int, out_features: int, stream: Stream, initial: Initial,
                 has_bias: bool = True) -> None:
        super().__init__()
        self.stream = stream
        self.deferral: WeightGradients | None = None
        self.weight = split_parameter((out_features, in_features), 1, stream.axis, matrix(initial))
        self.bias = replicated_parameter((out_features,), stream.axis, BIAS,
                                         has_partial_gradient=True) if has_bias else None

    def forward(self, x_ti: Tensor) -> Tensor:
        """[u, o], all features of this rank's tokens."""
        if self.recipe is not None:
            return self.adapted(_in_fp8(x_ti, [self], [self._bias_of_sum()], leaving=self.stream)[0], x_ti)
        # Only the first rank adds the bias, in its matrix product, and so it gets the bias' whole gradient.
        is_first = self.stream.axis.rank == 0
        bias_o = self.bias if self.bias is None or is_first else self.bias * 0
        product_to = linear(x_ti, self.weight, self.weight_in(x_ti.dtype), bias_o, self.bias_copy if is_first else None,
                            deferral=self.deferral)
        return self.adapted(self.stream.leave(product_to), x_ti)

    def product(self, x_ti: Tensor) -> Product:
        """The output, and the bias if that is left to the kernel that follows, which then adds it; else None."""
        if not takes_triton(x_ti):
            return self(x_ti), None
        if self.recipe is not None:
            return self.adapted(_in_fp8(x_ti, [self], [None], leaving=self.stream)[0], x_ti), self._bias_of_sum()
        product_to = linear(x_ti, self.weight, self.weight_in(x_ti.dtype), None, deferral=self.deferral)
        return self.adapted(self.stream.leave(product_to), x_ti), self._bias_of_sum()

    def _bias_of_sum(self) -> Tensor | None:
        """The bias, to be added after the sum over the ranks."""
        bias_o: Tensor | None = self.bias
        if bias_o is not None and self.stream.axis.rank and not self.stream.is_split:
            bias_o = bias_o.detach() + bias_o * 0  # all ranks add it to the same tokens: only the first has a gradient
        return bias_o


class EmbeddingTable(nn.Module):
    """Looks up a row of `weight` [num_rows, h] for each id of this rank's tokens; whole on every rank."""

    def __init__(self, num_rows: int, hidden_size: int, stream: Stream, initial: Initial) -> None:
        super().__init__()
        self.weight = stream.parameter((num_rows, hidden_size), table(initial))

    def forward(self, ids_u: Tensor) -> Tensor:
        """[u, h]."""
        return F.embedding(ids_u, self.weight)


def linear(x_ui: Tensor, weight_oi: Tensor, matrix_oi: Tensor, bias_o: Tensor | None, vector_o: Tensor | None = None,
           stream: Stream = ONE_RANK_STREAM, deferral: WeightGradients | None = None) -> Tensor:
    """`x Wᵀ`, plus `b` if there is one, [t, o] for all tokens of the stream, in x's dtype.

    `weight_oi` and `bias_o`: the parameters, which get the gradients. `matrix_oi`: the weight in x's dtype; `vector_o`:
    the bias in x's dtype, if there is a copy. Forward: with sequence parallelism the tokens are gathered. Backward: the
    input's gradient is summed over the axis (reduce-scatter or all-reduce).
    """
    return _Linear.apply(x_ui, stream, deferral, weight_oi, matrix_oi, bias_o, vector_o)[0]


def products_together(x_ui: Tensor, *layers: ColumnParallelLinear) -> list[Product]:
    """Each layer's `product` of the same input: its tokens are gathered, and its gradients summed, only once."""
    leaves_bias = adds_biases(x_ui)
    if layers[0].recipe is not None:
        biases = [None if leaves_bias else layer.bias for layer in layers]
        products = _in_fp8(x_ui, layers, biases, entry=layers[0].stream)
    else:
        operands: list[Tensor | None] = []
        for layer in layers:
            bias_pair = (None, None) if leaves_bias else (layer.bias, layer.bias_copy)
            operands += [layer.weight, layer.weight_in(x_ui.dtype), *bias_pair]
        products = _Linear.apply(x_ui, layers[0].stream, layers[0].deferral, *operands)
    return [(layer.adapted(product, x_ui), layer.bias if leaves_bias else None)
            for product, layer in zip(products, layers, strict=True)]


def _in_fp8(x_ui: Tensor, layers: Sequence[ColumnParallelLinear | RowParallelLinear], biases: Sequence[Tensor | None],
            entry: Stream = ONE_RANK_STREAM, leaving: Stream = ONE_RANK_STREAM) -> tuple[Tensor, ...]:
    recipe = layers[0].recipe
    assert recipe is not None, "layers that are multiplied together have one recipe"
    operands = [(layer.weight, layer.fp8_copy or weight_operands(layer.weight, recipe, x_ui.dtype), bias_o,
                 layer.amaxes)
                for layer, bias_o in zip(layers, biases, strict=True)]
    return fp8_products(x_ui, recipe, entry, leaving, layers[0].deferral, operands)


class _Linear(torch.autograd.Function):
    """`operands`: four for each layer: weight, weight in the input's dtype, bias, copy of the bias in some dtype or
    None.

    Only this rank's tokens are saved (none if all weights are frozen); with sequence parallelism the backward pass
    gathers them again. There each collective overlaps with a matrix product that does not need it. The weight is kept
    on `ctx` and not among the saved tensors, because torch.utils.checkpoint replaces those, and gradients have to be
    accumulated on the leaf itself.
    """

    @staticmethod
    def forward(ctx: Any, x_ui: Tensor, stream: Stream, deferral: WeightGradients | None,
                *operands: Any) -> tuple[Tensor, ...]:
        weights, matrices, biases, vectors = (operands[place::4] for place in range(4))
        ctx.save_for_backward(x_ui if any(ctx.needs_input_grad[3::4]) else None, *matrices)
        ctx.weights, ctx.stream, ctx.deferral = weights, stream, deferral
        ctx.bias_dtypes = [None if bias_o is None else bias_o.dtype for bias_o in biases]
        x_ti = stream.start_enter(x_ui).wait()
        at_hand = [bias_o if vector_o is None or vector_o.dtype != x_ui.dtype else vector_o
                   for bias_o, vector_o in zip(biases, vectors, strict=True)]
        return tuple(F.linear(x_ti, matrix_oi, None if vector_o is None else vector_o.to(x_ui.dtype))
                     for matrix_oi, vector_o in zip(matrices, at_hand, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads_to: Tensor) -> tuple[Tensor | None, ...]:
        x_ui, *matrices = ctx.saved_tensors
        gathering = None if x_ui is None else ctx.stream.start_enter(x_ui)
        grad_ti = grads_to[0] @ matrices[0]
        for grad_to, matrix_oi in zip(grads_to[1:], matrices[1:], strict=True):
            grad_ti = torch.addmm(grad_ti, grad_to, matrix_oi)
        x_ti = x_ui if gathering is None else gathering.wait()
        summing = ctx.stream.start_leave(grad_ti)
        grads: list[Tensor | None] = []
        for place, (weight_oi, grad_to) in enumerate(zip(ctx.weights, grads_to, strict=True)):
            is_trained, _, has_trained_bias, _ = ctx.needs_input_grad[3 + 4 * place:7 + 4 * place]
            grads += [weight_gradient(weight_oi, grad_to, x_ti, ctx.deferral) if is_trained else None, None,
                      sum_over_tokens(grad_to, ctx.bias_dtypes[place]) if has_trained_bias else None, None]
        return summing.wait(), None, None, *grads
