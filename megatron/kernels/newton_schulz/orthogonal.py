"""The matrix with orthogonal rows that is nearest to a given one, approximately, by Newton-Schulz iteration.

Of X = U S Vᵀ each step takes a X + b (X Xᵀ) X + c (X Xᵀ)² X, which changes S alone; with Jordan's coefficients (Muon,
2024, https://kellerjordan.github.io/posts/muon) five steps bring all singular values above some hundredth of the
largest to between 0.68 and 1.14. Shapes: k matrices, m rows, n columns, m at most n.
"""

import torch
from torch import Tensor

from megatron.kernels.device import takes_gpu_way
from megatron.kernels.newton_schulz.symmetric import gram, with_square

A, B, C = 3.4445, -4.7750, 2.0315
_TINY = 1e-30


def working_dtype(tensor: Tensor) -> torch.dtype:
    """In which the iteration runs on the device of `tensor`: it forgives the rounding of bf16."""
    return torch.bfloat16 if takes_gpu_way(tensor) else torch.float32


def orthogonalised(x_kmn: Tensor, num_steps: int) -> Tensor:
    """Each matrix with its singular values brought near to 1, in the dtype of `x_kmn`; one of zeros stays."""
    x_kmn = x_kmn / torch.linalg.vector_norm(x_kmn, dim=(1, 2), keepdim=True).clamp(min=_TINY)
    if x_kmn.dtype == torch.bfloat16:
        return _by_matrix(x_kmn, num_steps)
    return _by_gram(x_kmn, num_steps) if 2 * x_kmn.shape[1] <= x_kmn.shape[2] else _by_matrix(x_kmn, num_steps)


def _by_matrix(x_kmn: Tensor, num_steps: int) -> Tensor:
    """The iteration as it is written down."""
    for _ in range(num_steps):
        polynomial_kmm = with_square(gram(x_kmn), B, C)
        x_kmn = torch.baddbmm(x_kmn, polynomial_kmm, x_kmn, beta=A)
    return x_kmn


def _by_gram(x_kmn: Tensor, num_steps: int) -> Tensor:
    """The same on G = X Xᵀ alone, where X is much wider than high: with P = a + b G + c G², X becomes P X, G P² G.

    Takes more than bf16's digits: G has the squares of the singular values.
    """
    gram_kmm, product_kmm = gram(x_kmn), None
    for step in range(num_steps):
        polynomial_kmm = with_square(gram_kmm, B, C)
        polynomial_kmm.diagonal(dim1=1, dim2=2).add_(A)
        product_kmm = polynomial_kmm if product_kmm is None else polynomial_kmm @ product_kmm
        if step < num_steps - 1:
            gram_kmm = gram_kmm @ polynomial_kmm @ polynomial_kmm
    return x_kmn if product_kmm is None else product_kmm @ x_kmn
