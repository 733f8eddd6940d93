"""Matrix products with symmetric results: on GPUs the tiles of the lower triangle are computed, and mirrored.

Shapes: k matrices, m rows, n columns.
"""

import torch
from torch import Tensor

from megatron.kernels.device import operator, takes_triton


def gram(x_kmn: Tensor) -> Tensor:
    """X Xᵀ of each of k matrices X, [k, m, m]."""
    return _symmetric(x_kmn, 0.0, 1.0)


def with_square(a_kmm: Tensor, factor: float, of_square: float) -> Tensor:
    """factor · A + of_square · A² of each of k symmetric matrices A, [k, m, m]."""
    return _symmetric(a_kmm, factor, of_square)


def symmetric_reference(x_kmn: Tensor, factor: float, of_product: float) -> Tensor:
    """factor · X + of_product · X Xᵀ, [k, m, m], by PyTorch; unless the factor is 0 X must be symmetric."""
    if not factor:
        return of_product * x_kmn @ x_kmn.mT if of_product != 1 else x_kmn @ x_kmn.mT
    return torch.baddbmm(x_kmn, x_kmn, x_kmn.mT, beta=factor, alpha=of_product)


def _symmetric(x_kmn: Tensor, factor: float, of_product: float) -> Tensor:
    if not takes_triton(x_kmn):
        return symmetric_reference(x_kmn, factor, of_product)
    return _by_triton(x_kmn, factor, of_product)


@operator("symmetric_product", lambda x_kmn, *_: _empty(x_kmn))
def _by_triton(x_kmn: Tensor, factor: float, of_product: float) -> Tensor:
    from megatron.kernels.newton_schulz.symmetric_triton import launch

    x_kmn, out_kmm = x_kmn.contiguous(), _empty(x_kmn)
    launch(x_kmn, factor, of_product, out_kmm)
    return out_kmm


def _empty(x_kmn: Tensor) -> Tensor:
    return x_kmn.new_empty(*x_kmn.shape[:2], x_kmn.shape[1])
