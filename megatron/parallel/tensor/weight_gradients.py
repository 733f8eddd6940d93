"""A linear layer's weight gradient, accumulated in fp32 over micro-batches.

Shapes: t tokens, i and o features in and out.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.device import is_fake, takes_gpu_way
from megatron.kernels.fp8 import Quantised, product

# PyTorch 2.11 cannot add a half-precision product to fp32 where tensors have no values. A half-precision sum in half of
# the bytes of the gradient, and a pass over the other half, read, write and allocate as much.
_ADDS_WIDER_FAKES = torch.__version__ >= "2.13"
Factor = Tensor | Quantised  # output gradient [t, o] or input [t, i]; in FP8 transposed, [o, t] or [i, t]


def added_weight_gradient(weight_oi: Tensor, grad: Factor, x: Factor) -> Tensor | None:
    """The weight gradient [o, i] of `x Wᵀ` in the weight's dtype; None if it was added to `weight_oi.grad` in place."""
    # Inside a compiled graph a parameter's .grad is out of reach.
    so_far_oi = weight_oi.grad if weight_oi.is_leaf and not torch.compiler.is_compiling() else None
    if isinstance(grad, Tensor) and isinstance(x, Tensor):
        return _product_added(so_far_oi, grad, x, weight_oi.dtype)
    assert isinstance(grad, Quantised) and isinstance(x, Quantised), "both are in FP8, or none"
    gradient_oi = product(grad, x, weight_oi.dtype)
    if so_far_oi is None:
        return gradient_oi
    so_far_oi.add_(gradient_oi)
    return None


def _product_added(so_far_oi: Tensor | None, grad_to: Tensor, x_ti: Tensor, dtype: torch.dtype) -> Tensor | None:
    """As `added_weight_gradient`; where the library has a product with fp32 output, nothing is rounded before the sum.
    """
    grad_ot = grad_to.t()
    gives_dtype = grad_to.dtype == dtype or takes_gpu_way(grad_to)
    wider: dict[str, Any] = {} if grad_to.dtype == dtype or not gives_dtype else {"out_dtype": dtype}
    if so_far_oi is None or not gives_dtype:
        return torch.mm(grad_ot, x_ti, **wider).to(dtype)
    if is_fake(so_far_oi) and wider and not _ADDS_WIDER_FAKES:
        half_oi, other_oi = so_far_oi.view(x_ti.dtype).chunk(2, 1)
        torch.addmm(half_oi, grad_ot, x_ti, out=half_oi)
        other_oi.mul_(1)
    else:
        torch.addmm(so_far_oi, grad_ot, x_ti, **wider, out=so_far_oi)
    return None
