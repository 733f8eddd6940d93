"""x + a depthwise convolution of x over neighbouring tokens of the same protein: one pass over memory, one backward.

Of k taps, an odd number, the one in the middle is the token's own: out[t] = x[t] + Σ_i w[:, i] · x[t + i - k // 2],
without what lies in another protein; products and sums in fp32. On GPUs Triton does it, on CPUs the C++ helper, of up
to seven taps; elsewhere, and where torch.compile fuses plain functions by itself, PyTorch does. Shapes: t tokens, f
features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron.kernels.device import operator, takes_triton
from megatron.kernels.pointwise import native
from megatron.kernels.pointwise.native import takes_native


def convolved(x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor,
              added_bias_f: Tensor | None = None) -> Tensor:
    """The convolution's output [t, f], in the dtype of `x_tf`.

    `positions_t`: each token's position in its protein, int64: the number of tokens of its protein before it.
    `added_bias_f`: a bias that `x_tf` already contains. The forward pass does not use it; the backward pass computes
    its gradient, the sum of that of `x_tf` over the tokens. Triton's kernel alone does that (`takes_triton`).
    """
    assert added_bias_f is None or takes_triton(x_tf), "whoever added the bias computes its gradient"
    if takes_triton(x_tf) or takes_native(x_tf) and weight_fk.shape[1] in native.TAPS:
        return _Convolved.apply(x_tf, positions_t, weight_fk, added_bias_f)
    return convolved_reference(x_tf, positions_t, weight_fk)


def convolved_reference(x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor) -> Tensor:
    """The same [t, f] by PyTorch's own functions."""
    size, halo = len(x_tf), weight_fk.shape[1] // 2
    out_tf = wide_tf = x_tf.to(torch.promote_types(x_tf.dtype, torch.float32))
    around, positions = F.pad(wide_tf, (0, 0, halo, halo)), F.pad(positions_t, (0, halo))
    for place, weight_f in enumerate(weight_fk.to(wide_tf.dtype).unbind(1)):
        distance, later = abs(place - halo), max(place - halo, 0)
        is_other_t = positions[later:later + size] < distance  # the later one of the two is too near to its start
        out_tf = out_tf + around[place:place + size].masked_fill(is_other_t[:, None], 0) * weight_f
    return out_tf.to(x_tf.dtype)


class _Convolved(torch.autograd.Function):
    """Keeps `x_tf` for the backward pass, which computes all gradients in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor,
                added_bias_f: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_tf, positions_t, weight_fk)
        ctx.bias_dtype = None if added_bias_f is None else added_bias_f.dtype
        return _forward(x_tf, positions_t, weight_fk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tf: Tensor) -> tuple[Tensor | None, ...]:
        x_tf, positions_t, weight_fk = ctx.saved_tensors
        has_bias = ctx.needs_input_grad[3]
        grad_x_tf, grads_y = _backward(grad_tf, x_tf, positions_t, weight_fk, has_bias)
        grad_weight_y, grad_bias_f = grads_y.split([weight_fk.numel(), len(grads_y) - weight_fk.numel()])
        return (grad_x_tf, None, grad_weight_y.view(weight_fk.shape).to(weight_fk.dtype),
                grad_bias_f.to(ctx.bias_dtype) if has_bias else None)


def _of(tensor: Tensor) -> Any:
    """The module with the kernels for such a tensor: the C++ helper's or Triton's."""
    if native.runs_native(tensor):
        return native
    from megatron.kernels.pointwise import convolution_triton  # it imports Triton, which may be missing

    return convolution_triton


@operator("convolved", lambda x_tf, *_: x_tf.new_empty(x_tf.shape))
def _forward(x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor) -> Tensor:
    return _of(x_tf).convolve(x_tf, positions_t, weight_fk)


@operator("convolved_backward", lambda grad_tf, x_tf, positions_t, *others: _gradients(x_tf, *others))
def _backward(grad_tf: Tensor, x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor,
              has_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradient of `x_tf`, and in one fp32 tensor those of the weight [f·k] and, if `has_bias`, of the bias [f]."""
    return _of(x_tf).convolve_backward(grad_tf, x_tf, positions_t, weight_fk, has_bias)


def _gradients(x_tf: Tensor, weight_fk: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    size = weight_fk.numel() + (x_tf.shape[1] if has_bias else 0)
    return x_tf.new_empty(x_tf.shape), x_tf.new_empty(size, dtype=torch.float32)
