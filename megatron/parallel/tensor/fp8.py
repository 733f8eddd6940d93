"""FP8 products of layers split over the tensor axis; tokens and gradients are also gathered in FP8.

Scales come from the tensors of the product itself, or with delayed scaling those of input and gradient from the last
steps (`Amaxes`). They do not change within a step, so that recomputation gives the same result. A scale shared by
tokens of several ranks is the same on them (all-reduce); other scales are each rank's own. Shapes as in `layers`: t
tokens, u of them in the stream on this rank, i and o features in and out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.fp8 import E4M3, Quantised, Recipe, largest, product, quantised
from megatron.kernels.pointwise.product import sum_over_tokens
from megatron.parallel.collectives import all_reduce_max
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.parallel.tensor.weight_gradients import WeightGradients, weight_gradient


class Operands(NamedTuple):
    """A weight [o, i] in FP8, for both products."""

    weight_oi: Quantised  # for the product with the input
    weight_io: Quantised  # for the product with the output's gradient


class Amax(NamedTuple):
    """Largest magnitudes of one tensor, fp32 [1, 1], with delayed scaling; None without.

    `seen` receives the tensor's own: an input's as an in-place maximum, a gradient's as the gradient of `seen`, because
    compiled backward passes must not write to their inputs.
    """

    known: Tensor | None = None  # from the history: the tensor is scaled by it; None: by its own
    seen: Tensor | None = None


class Amaxes(NamedTuple):
    """The two of a layer: of its input, and of its output's gradient."""

    input: Amax = Amax()
    gradient: Amax = Amax()


_NOTHING = Amax()


def weight_operands(weight_oi: Tensor, recipe: Recipe, dtype: torch.dtype) -> Operands:
    """The operands of a weight, rounded to `dtype` first, as FSDP2 gathers it: so that all layouts agree."""
    by_dim = _both_ways(weight_oi.detach().to(dtype), recipe, E4M3, ONE_RANK_STREAM)
    return Operands(by_dim[1].along(1), by_dim[0].along(0))


def fp8_products(x_ui: Tensor, recipe: Recipe, entry: Stream, leaving: Stream, deferral: WeightGradients | None,
                 layers: Sequence[tuple[Tensor, Operands, Tensor | None, Amaxes]]) -> tuple[Tensor, ...]:
    """`x Wᵀ`, plus `b` if there is one, in x's dtype, for each of `layers`: (weight, its operands, bias, `Amaxes`).

    The input's amax is that of the first layer. Forward: with sequence parallelism, the tokens are gathered from the
    stream `entry`, or the products reduce-scattered into the stream `leaving`; without, the latter are all-reduced.
    Backward: the reverse. `deferral`: takes the weight gradients to compute them later.
    """
    operands = [operand for weight_oi, in_fp8, bias_o, amaxes in layers
                for operand in (weight_oi, bias_o, *in_fp8.weight_oi, *in_fp8.weight_io, *amaxes.input,
                                *amaxes.gradient)]
    return _Fp8Linear.apply(x_ui, recipe, entry, leaving, deferral, *operands)


class _Fp8Linear(torch.autograd.Function):
    """`operands`: ten for each layer: weight, bias, the four tensors of its `Operands`, the four of its `Amaxes`.

    Only this rank's tokens of the input are saved for the backward pass, in FP8, quantised for the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_ui: Tensor, recipe: Recipe, entry: Stream, leaving: Stream,
                deferral: WeightGradients | None, *operands: Any) -> tuple[Tensor, ...]:
        weights, biases = operands[0::10], operands[1::10]
        places = range(0, len(operands), 10)
        matrices = [Quantised(*operands[place + 2:place + 4]) for place in places]
        by_dim = _both_ways(x_ui, recipe, E4M3, entry, Amax(*operands[6:8]))
        ctx.save_for_backward(*by_dim[0], *(tensor for place in places for tensor in operands[place + 4:place + 6]))
        ctx.weights, ctx.recipe, ctx.entry, ctx.leaving, ctx.deferral = weights, recipe, entry, leaving, deferral
        ctx.bias_dtypes = [None if bias_o is None else bias_o.dtype for bias_o in biases]
        ctx.amaxes = [Amax(*operands[place + 8:place + 10]) for place in places]
        x_ti = _start_gather(by_dim[1], entry)()
        leavings = [leaving.start_leave(product(x_ti, matrix_oi, x_ui.dtype, is_fast=True)) for matrix_oi in matrices]
        return tuple(pending.wait() if bias_o is None else pending.wait() + bias_o.to(x_ui.dtype)
                     for pending, bias_o in zip(leavings, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads_uo: Tensor) -> tuple[Tensor | None, ...]:
        values_ui, scale, *matrices = ctx.saved_tensors
        recipe, dtype = ctx.recipe, grads_uo[0].dtype
        gathering = _start_gather(Quantised(values_ui, scale), ctx.entry)
        amaxes = [Amax(known, None if seen is None else torch.zeros_like(seen)) for known, seen in ctx.amaxes]
        grads = [_gathered_gradient(grad_uo, recipe, ctx.leaving, amax)
                 for grad_uo, amax in zip(grads_uo, amaxes, strict=True)]
        grad_ti = product(grads[0][1], Quantised(*matrices[:2]), dtype)
        for place in range(1, len(grads)):
            grad_ti += product(grads[place][1], Quantised(*matrices[2 * place:2 * place + 2]), dtype)
        x_it = gathering().along(0)
        summing = ctx.entry.start_leave(grad_ti)
        of_operands: list[Tensor | None] = []
        for place, (weight_oi, grad_uo, by_dim) in enumerate(zip(ctx.weights, grads_uo, grads, strict=True)):
            is_trained, has_trained_bias = ctx.needs_input_grad[5 + 10 * place:7 + 10 * place]
            of_operands += [
                weight_gradient(weight_oi, by_dim[0].along(0), x_it, ctx.deferral) if is_trained else None,
                sum_over_tokens(grad_uo, ctx.bias_dtypes[place]) if has_trained_bias else None, *[None] * 7,
                amaxes[place].seen]
        return summing.wait(), *[None] * 4, *of_operands


def _both_ways(x_rc: Tensor, recipe: Recipe, dtype: torch.dtype, stream: Stream,
               of_steps: Amax = _NOTHING) -> tuple[Quantised, Quantised]:
    """`x_rc` in FP8, for products that sum over its first dimension, and for those that sum over its second."""
    if recipe.scaling == "tensorwise":
        x = _scaled_over(1, x_rc, recipe, dtype, stream, of_steps)
        return x, x
    return _scaled_over(0, x_rc, recipe, dtype, stream), _scaled_over(1, x_rc, recipe, dtype, stream)


def _scaled_over(dim: int, x_rc: Tensor, recipe: Recipe, dtype: torch.dtype, stream: Stream,
                 of_steps: Amax = _NOTHING) -> Quantised:
    amax = largest(x_rc, recipe.scaling, dim)
    if of_steps.seen is not None:
        of_steps.seen.copy_(torch.maximum(of_steps.seen, amax))
    if of_steps.known is not None:
        return quantised(x_rc, of_steps.known, recipe.scaling, dtype)
    if stream.is_split and len(amax) == 1:
        all_reduce_max(amax, stream.axis)
    return quantised(x_rc, amax, recipe.scaling, dtype)


def _start_gather(x_uc: Quantised, stream: Stream) -> Callable[[], Quantised]:
    """Begin to gather all tokens of the stream in FP8, with their scales if each token has its own."""
    values = stream.start_enter(x_uc.values.view(torch.uint8))
    scale = stream.start_enter(x_uc.scale) if len(x_uc.scale) > 1 else None
    return lambda: Quantised(values.wait().view(x_uc.values.dtype), x_uc.scale if scale is None else scale.wait())


def _gathered_gradient(grad_uo: Tensor, recipe: Recipe, leaving: Stream,
                       of_steps: Amax) -> tuple[Quantised, Quantised]:
    """`_both_ways` of the gradients of all tokens: gathered in FP8 if one tensor serves both products, else before."""
    if recipe.scaling == "tensorwise":
        grad_to = _start_gather(_both_ways(grad_uo, recipe, recipe.gradients, leaving, of_steps)[0], leaving)()
        return grad_to, grad_to
    return _both_ways(leaving.start_enter(grad_uo).wait(), recipe, recipe.gradients, ONE_RANK_STREAM)
