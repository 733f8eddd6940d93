"""Deferred weight gradients: they are computed after the input gradients, for which the previous pipeline rank waits.

The idea of zero-bubble pipelining (Qi et al., 2023, arXiv 2401.10241): only the part of a backward pass that leads to
the stage's input is urgent. Each layer computes the same products, only later, and in the order of the micro-batches,
so that no bit of a gradient changes and no collective is repeated. Shapes: t tokens, i and o features in and out.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from megatron.kernels.fp8 import Quantised
from megatron.parallel.tensor.weight_gradients import Factor, added_weight_gradient


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
