"""The Newton-Schulz iteration against the singular values that it is meant to change, in fp64."""

import pytest
import torch

from megatron.kernels.newton_schulz.orthogonal import COEFFICIENTS, orthogonalised, working_dtype
from megatron.kernels.newton_schulz.symmetric import gram, with_square


def by_singular_values(x_kmn, num_steps):
    """What the iteration comes to, in fp64."""
    left, values, right = torch.linalg.svd(x_kmn.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-30)
    for a, b, c in COEFFICIENTS[:num_steps]:
        values = a * values + b * values**3 + c * values**5
    return left * values[:, None] @ right


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (3, 24, 24), (2, 31, 61), (2, 33, 99), (1, 20, 300)])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_singular_values_change_and_nothing_else(shape, num_steps):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    torch.testing.assert_close(orthogonalised(x, num_steps).double(), by_singular_values(x, num_steps), rtol=0,
                               atol=2e-4)  # errors grow with the short directions


def test_directions_a_thousandth_as_long_keep_their_digits():
    torch.manual_seed(1)
    for shape in ((32, 40), (32, 128)):
        left, _, right = torch.linalg.svd(torch.randn(1, *shape), full_matrices=False)
        x = left * torch.logspace(0, -3, 32) @ right
        error = orthogonalised(x, 5).double() - by_singular_values(x, 5)
        assert error.abs().max() < 5e-4


@pytest.mark.parametrize(("num_steps", "low", "high"), [(3, 0.16, 1.9), (4, 0.4, 1.6), (5, 0.85, 1.14)])
def test_directions_of_very_different_lengths_come_close_to_one(num_steps, low, high):
    torch.manual_seed(2)
    for shape in ((64, 64), (64, 200)):
        left, _, right = torch.linalg.svd(torch.randn(1, *shape), full_matrices=False)
        values = torch.linalg.svdvals(orthogonalised(left * torch.logspace(0, -2.5, 64) @ right, num_steps))
        assert low < values.min() and values.max() < high


def test_one_direction_alone_is_safe_in_bf16():
    torch.manual_seed(6)
    for _ in range(20):
        x = (torch.randn(3, 40, 1) @ torch.randn(3, 1, 90)).bfloat16()
        assert torch.linalg.svdvals(orthogonalised(x, 5).float()).max() < 1.3


@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e12])
def test_how_long_a_matrix_is_does_not_matter_and_zeros_stay(factor):
    torch.manual_seed(3)
    x = torch.randn(1, 8, 12)
    expected = orthogonalised(x, 5) if factor else torch.zeros_like(x)
    torch.testing.assert_close(orthogonalised(factor * x, 5), expected)


def test_bf16_is_close_and_taken_on_gpus_alone():
    torch.manual_seed(4)
    x = torch.randn(2, 48, 200)
    error = orthogonalised(x.bfloat16(), 5).double() - by_singular_values(x, 5)
    assert error.norm() < 0.03 * by_singular_values(x, 5).norm()
    assert working_dtype(x) == torch.float32 and working_dtype(x.to("meta")) == torch.bfloat16


def test_symmetric_products_are_what_they_say():
    torch.manual_seed(5)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x @ x.mT)
    torch.testing.assert_close(with_square(gram(x), -2.0, 3.0), -2 * gram(x) + 3 * gram(x) @ gram(x))
