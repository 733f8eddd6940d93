"""The matrix with orthogonal rows that is nearest to a given one, approximately, by Newton-Schulz iteration.

Of X = U S Vᵀ each step makes a X + b (X Xᵀ) X + c (X Xᵀ)² X, which changes S alone. The coefficients are those of Polar
Express (Amsel et al., 2025, arXiv 2505.16932), other ones in each step. Singular values that begin above 1/300 of the
matrix's norm lie between 0.19 and 1.87 after three steps, 0.44 and 1.56 after four, 0.87 and 1.12 after five. The
gradients of small models have many smaller ones, which three of these steps raise about as far as five of Jordan's
(Muon, 2024), whose coefficients are the same in each step. Shapes: k matrices, m rows, n columns, m at most n.
"""

import torch
from torch import Tensor

from megatron.kernels.device import takes_gpu_way
from megatron.kernels.newton_schulz.symmetric import gram, with_square

_PUBLISHED = ((8.28721201814563, -23.595886519098837, 17.300387312530933),
              (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
              (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
              (3.3184196573706015, -2.488488024314874, 0.51004894012372),
              (2.300652019954817, -1.6689039845747493, 0.4188073119525673))
# As in the paper, each step divides X by this first: rounded to bf16, its norm may be a little above 1, where the
# polynomials soon grow.
_MARGIN = 1.01
COEFFICIENTS = tuple((a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _PUBLISHED)
_TINY = 1e-30
Coefficients = tuple[tuple[float, float, float], ...]


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the iteration on the device of `tensor`: it converges in bf16 too, which is faster on GPUs."""
    return torch.bfloat16 if takes_gpu_way(tensor) else torch.float32


def orthogonalised(x_kmn: Tensor, num_steps: int) -> Tensor:
    """Each matrix with its singular values brought near to 1, in the dtype of `x_kmn`; one of zeros stays."""
    if takes_gpu_way(x_kmn):
        return _orthogonalised(x_kmn, COEFFICIENTS[:num_steps])
    # On a CPU as many at once as it has threads, so that what lies between two products stays in its cache.
    return torch.cat([_orthogonalised(together, COEFFICIENTS[:num_steps])
                      for together in x_kmn.split(torch.get_num_threads())])


def num_flops(shape: tuple[int, int], num_steps: int) -> int:
    """FLOPs of the iteration on one matrix on GPUs, which compute half of each symmetric product."""
    m, n = sorted(shape)
    return num_steps * (m * m * n + m**3 + 2 * m * m * n)


def _orthogonalised(x_kmn: Tensor, coefficients: Coefficients) -> Tensor:
    norm_k11 = torch.linalg.vector_norm(x_kmn, dim=(1, 2), keepdim=True, dtype=torch.float32)
    inverse_k11 = (1 / norm_k11.clamp(min=_TINY)).to(x_kmn.dtype)
    if 3 * x_kmn.shape[1] <= x_kmn.shape[2] and x_kmn.dtype != torch.bfloat16:
        return _by_gram(x_kmn, inverse_k11, coefficients)
    x_kmn = x_kmn * inverse_k11
    for a, b, c in coefficients:
        x_kmn = torch.baddbmm(x_kmn, with_square(gram(x_kmn), b, c), x_kmn, beta=a)
    return x_kmn


def _by_gram(x_kmn: Tensor, inverse_k11: Tensor, coefficients: Coefficients) -> Tensor:
    """The same on G = X Xᵀ alone, where X is much wider than high: with P = a + b G + c G², X becomes P X, G P² G.

    It takes more than bf16's digits: G has the squares of the singular values. `inverse_k11`: what X is multiplied by.
    """
    gram_kmm, product_kmm = gram(x_kmn).mul_(inverse_k11).mul_(inverse_k11), None
    for number, (a, b, c) in enumerate(coefficients):
        polynomial_kmm = with_square(gram_kmm, b, c)
        polynomial_kmm.diagonal(dim1=1, dim2=2).add_(a)
        product_kmm = polynomial_kmm if product_kmm is None else polynomial_kmm @ product_kmm
        if number + 1 < len(coefficients):
            gram_kmm = gram_kmm @ polynomial_kmm @ polynomial_kmm
    assert product_kmm is not None
    return product_kmm.mul_(inverse_k11) @ x_kmn
