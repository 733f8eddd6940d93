"""Weights' gradients that are computed later than the gradients that the previous pipeline rank waits for.

The idea of zero-bubble pipelining (Qi et al., 2023, arXiv 2401.10241): of a backward pass only the part that leads to
the stage's input is urgent. Each layer computes the same product, only later, and in the order of the micro-batches, so
that no bit of a gradient changes and no collective is repeated. Shapes: t tokens, i and o features in and out.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron.kernels.device import is_fake, takes_gpu_way
from megatron.kernels.fp8 import Quantised, product

Factor = Tensor | Quantised  # of the product: the output's gradient [t, o] and the input [t, i]; in FP8 [o, t], [i, t]


class WeightGradients:
    """The products that wait, a list for each backward pass."""

    def __init__(self) -> None:
        self._waiting: deque[list[tuple[Tensor, Factor, Factor]]] = deque()
        self._is_collecting = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """The context of one backward pass whose weights' gradients are to wait."""
        self._waiting.append([])
        self._is_collecting = True
        try:
            yield
        finally:
            self._is_collecting = False

    def takes(self, weight_oi: Tensor, grad: Factor, x: Factor) -> bool:
        """Whether the gradient of `weight_oi`, a leaf, is left to this queue; autograd is then not to get it."""
        if self._is_collecting and weight_oi.requires_grad:
            # Without the input's graph, which would keep what the stage received, and grow by the product.
            self._waiting[-1].append((weight_oi, grad, x if isinstance(x, Quantised) else x.detach()))
        return self._is_collecting

    def compute_oldest(self) -> None:
        """Add the gradients of the backward pass that has waited longest to those of the weights."""
        for weight_oi, grad, x in self._waiting.popleft():
            gradient_oi = remaining_weight_gradient(weight_oi, grad, x)
            if gradient_oi is not None:
                weight_oi.grad = gradient_oi if weight_oi.grad is None else weight_oi.grad.add_(gradient_oi)


def weight_gradient(weight_oi: Tensor, grad: Factor, x: Factor, deferral: WeightGradients | None) -> Tensor | None:
    """The gradient [o, i]; None where it is left for later, or added to the weight's own already."""
    if deferral is not None and deferral.takes(weight_oi, grad, x):
        return None
    return remaining_weight_gradient(weight_oi, grad, x)


def remaining_weight_gradient(weight_oi: Tensor, grad: Factor, x: Factor) -> Tensor | None:
    """The gradient [o, i] of `x Wᵀ` in the weight's dtype; None where it has been added to the weight's own."""
    # Compiled graphs do not reach a parameter's gradient.
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
    """Nothing is rounded between the product and the sum where the library has a product that gives fp32."""
    grad_ot = grad_to.t()
    gives_dtype = grad_to.dtype == dtype or takes_gpu_way(grad_to)
    wider: dict[str, Any] = {} if grad_to.dtype == dtype or not gives_dtype else {"out_dtype": dtype}
    if so_far_oi is None or not gives_dtype:
        return torch.mm(grad_ot, x_ti, **wider).to(dtype)
    try:
        torch.addmm(so_far_oi, grad_ot, x_ti, **wider, out=so_far_oi)
    except TypeError:  # torch 2.11 has none for tensors without values: one as large, in half of the gradient's bytes
        if not is_fake(so_far_oi):
            raise
        narrow_oi = so_far_oi.view(x_ti.dtype)[:, :so_far_oi.shape[1]]
        torch.addmm(narrow_oi, grad_ot, x_ti, out=narrow_oi)
    return None


def put_off_weight_gradients(model: nn.Module, waiting: WeightGradients) -> None:
    """Let `waiting` take the weights' gradients of every layer of `model` that can put them off."""
    for module in model.modules():
        if hasattr(module, "deferral"):
            module.deferral = waiting  # type: ignore[assignment]
