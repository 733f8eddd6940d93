"""The activation function of a feed-forward, and the biases before it: one pass over memory.

Kinds: "gelu_tanh" and "gelu" (Hendrycks and Gimpel, 2016, arXiv 1606.08415), "squared_relu" (So et al., 2021, arXiv
2109.08668), and with a gate "swiglu": silu(gate) · wide (Shazeer, 2020, arXiv 2002.05202). Shapes: t tokens, f features
of the feed-forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron.kernels.device import operator, takes_triton
from megatron.kernels.pointwise.native import activate, activate_backward, runs_native, takes_native
from megatron.kernels.pointwise.product import Product, whole


def activated(kind: str, wide: Product, gate: Product | None = None) -> Tensor:
    """The activation [t, f] of `wide` in its dtype, with swiglu gated by `gate`; adds biases that are still missing."""
    if adds_biases(wide[0]):
        return _Activated.apply(kind, *wide, *(gate or (None, None)))
    return activated_reference(kind, *(whole(product) for product in (wide, gate) if product is not None))


def adds_biases(product_tf: Tensor) -> bool:
    """Whether `activated` runs a kernel on these: it adds the biases, and sums their gradients in its backward pass."""
    return takes_triton(product_tf) or takes_native(product_tf)


def activated_reference(kind: str, wide_tf: Tensor, *gates: Tensor) -> Tensor:
    """The same of products that contain their biases, by PyTorch's own functions."""
    if kind == "swiglu":
        return F.silu(gates[0]) * wide_tf
    if kind == "squared_relu":
        return F.relu(wide_tf).square()
    return F.gelu(wide_tf, approximate="tanh" if kind == "gelu_tanh" else "none")


class _Activated(torch.autograd.Function):
    """Keeps the products without their biases for the backward pass, which adds these again."""

    @staticmethod
    def forward(ctx: Any, kind: str, wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None,
                gate_bias_f: Tensor | None) -> Tensor:
        ctx.save_for_backward(wide_tf, bias_f, gate_tf, gate_bias_f)
        ctx.kind = kind
        if runs_native(wide_tf):
            return activate(wide_tf, bias_f, gate_tf, gate_bias_f, kind)
        return _forward(wide_tf, bias_f, gate_tf, gate_bias_f, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tf: Tensor) -> tuple[Tensor | None, ...]:
        wide_tf, bias_f, gate_tf, gate_bias_f = ctx.saved_tensors
        if runs_native(wide_tf):
            return None, *activate_backward(grad_tf, wide_tf, bias_f, gate_tf, gate_bias_f, ctx.kind)
        grad_wide_tf, grad_gate_tf, grads_kf = _backward(grad_tf, wide_tf, bias_f, gate_tf, gate_bias_f, ctx.kind)
        of_biases = iter(grads_kf.unbind())
        of_bias_f, of_gate_bias_f = (None if bias is None else next(of_biases).to(bias.dtype)
                                     for bias in (bias_f, gate_bias_f))
        return None, grad_wide_tf, of_bias_f, None if gate_tf is None else grad_gate_tf, of_gate_bias_f


@operator("activated", lambda wide_tf, *_: wide_tf.new_empty(wide_tf.shape))
def _forward(wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None, gate_bias_f: Tensor | None,
             kind: str) -> Tensor:
    from megatron.kernels.pointwise.activation_triton import launch_forward

    wide_tf, gate_tf = wide_tf.contiguous(), None if gate_tf is None else gate_tf.contiguous()
    out_tf = torch.empty_like(wide_tf)
    launch_forward(wide_tf, bias_f, gate_tf, gate_bias_f, kind, out_tf)
    return out_tf


@operator("activated_backward", lambda grad_tf, *inputs: _gradients(*inputs[:4]))
def _backward(grad_tf: Tensor, wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None,
              gate_bias_f: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    from megatron.kernels.pointwise.activation_triton import launch_backward

    wide_tf, gate_tf = wide_tf.contiguous(), None if gate_tf is None else gate_tf.contiguous()
    grad_wide_tf, grad_gate_tf, _ = _gradients(wide_tf, bias_f, gate_tf, gate_bias_f)
    grads_kf = launch_backward(grad_tf.contiguous(), wide_tf, bias_f, gate_tf, gate_bias_f, kind, grad_wide_tf,
                               grad_gate_tf if gate_tf is not None else None)
    return grad_wide_tf, grad_gate_tf, grads_kf


def _gradients(wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None,
               gate_bias_f: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the gradients of the product, of the gate's product, and of the biases [k, f] that exist."""
    num_biases = (bias_f is not None) + (gate_bias_f is not None)
    return (wide_tf.new_empty(wide_tf.shape), wide_tf.new_empty(wide_tf.shape if gate_tf is not None else 0),
            wide_tf.new_empty((num_biases, wide_tf.shape[1]), dtype=torch.float32))
