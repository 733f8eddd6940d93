"""A linear layer's weight gradient: accumulated in fp32 over micro-batches, at once or deferred.

Deferral is the idea of zero-bubble pipelining (Qi et al., 2023, arXiv 2401.10241): only the part of a backward pass
that leads to the stage's input is urgent, because the previous pipeline rank waits for it. Each layer computes the same
products, only later, and in the order of the micro-batches, so that no bit of a gradient changes and no collective is
repeated. Shapes: t tokens, i and o features in and out.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron.kernels.device import is_fake, takes_gpu_way
from megatron.kernels.fp8 import Quantised, product

# PyTorch 2.11 cannot add a half-precision product to fp32 where tensors have no values. A half-precision sum in half of
# the bytes of the gradient, and a pass over the other half, read, write and allocate as much.
_ADDS_WIDER_FAKES = torch.__version__ >= "2.13"
Factor = Tensor | Quantised  # output gradient [t, o] or input [t, i]; in FP8 transposed, [o, t] or [i, t]


class WeightGradients:
    """A queue of deferred products, a list for each backward pass."""

    def __init__(self) -> None:
        self._waiting: deque[list[tuple[Tensor, Factor, Factor]]] = deque()
        self._is_collecting = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A context for one backward pass whose weight gradients are deferred."""
        self._waiting.append([])
        self._is_collecting = True
        try:
            yield
        finally:
            self._is_collecting = False

    def takes(self, weight_oi: Tensor, grad: Factor, x: Factor) -> bool:
        """Whether this queue takes over the gradient of `weight_oi`, a leaf; autograd must not get it then."""
        if self._is_collecting and weight_oi.requires_grad:
            # Detached: the input's graph would keep the stage's input alive, and record the product.
            self._waiting[-1].append((weight_oi, grad, x if isinstance(x, Quantised) else x.detach()))
        return self._is_collecting

    def compute_oldest(self) -> None:
        """Compute the weight gradients of the oldest backward pass, and accumulate them."""
        for weight_oi, grad, x in self._waiting.popleft():
            gradient_oi = added_weight_gradient(weight_oi, grad, x)
            if gradient_oi is not None:
                weight_oi.grad = gradient_oi if weight_oi.grad is None else weight_oi.grad.add_(gradient_oi)


def weight_gradient(weight_oi: Tensor, grad: Factor, x: Factor, deferral: WeightGradients | None) -> Tensor | None:
    """The weight gradient [o, i]; None if it is deferred, or was added to `weight_oi.grad` in place."""
    if deferral is not None and deferral.takes(weight_oi, grad, x):
        return None
    return added_weight_gradient(weight_oi, grad, x)


def defer_weight_gradients(model: nn.Module, waiting: WeightGradients) -> None:
    """Let `waiting` take the weight gradients of every layer of `model` that can defer them."""
    for module in model.modules():
        if hasattr(module, "deferral"):
            module.deferral = waiting  # type: ignore[assignment]


def added_weight_gradient(weight_oi: Tensor, grad: Factor, x: Factor) -> Tensor | None:
    """The weight gradient [o, i] of `x Wᵀ`; None if it was added to `weight_oi.grad` in place.

    In the dtype of `weight_oi.grad`, or, if there is none yet, of the weight.
    """
    # Inside a compiled graph a parameter's .grad is out of reach.
    so_far_oi = weight_oi.grad if weight_oi.is_leaf and not torch.compiler.is_compiling() else None
    # PyTorch 2.15's FSDP2 adds up the gradient of a gathered bf16 weight in fp32, in its .grad.
    dtype = weight_oi.dtype if so_far_oi is None else so_far_oi.dtype
    if isinstance(grad, Tensor) and isinstance(x, Tensor):
        return _product_added(so_far_oi, grad, x, dtype)
    assert isinstance(grad, Quantised) and isinstance(x, Quantised), "both are in FP8, or none"
    gradient_oi = product(grad, x, dtype)
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
