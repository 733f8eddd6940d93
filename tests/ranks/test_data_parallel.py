"""Data parallelism against one rank that sees the whole batch."""

import pytest
import torch

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.data_parallel import DataParallel
from megatron.parallel.mesh import Axis
from tests.ranks.launch import run_ranks


def summed_gradients(axis: Axis, implementation: str) -> dict[str, torch.Tensor]:
    """Gradients after two micro-batches a rank; rank r of s has rows r, r+s, … of four micro-batches in all."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    rows = torch.randn(4, 6, 5)
    parallel = DataParallel(model, axis, implementation)
    mine = list(range(axis.rank, 4, axis.size))
    for index in mine:
        with parallel.accumulating(is_last=index == mine[-1]):
            parallel(rows[index]).square().sum().backward()
    parallel.finish()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("implementation", ["local", "torch"])
def test_gradients_are_the_sums_that_one_rank_gets(implementation):
    expected = summed_gradients(Axis(), implementation)
    for gradients in run_ranks(summed_gradients, 2, implementation):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)


def sum_of_ranks(axis: Axis) -> torch.Tensor:
    return all_reduce_sum(torch.tensor([axis.rank + 1.0]), axis)


def test_every_rank_gets_the_sum_over_the_axis():
    assert [value.item() for value in run_ranks(sum_of_ranks, 3)] == [6.0] * 3
    assert all_reduce_sum(torch.tensor([5.0]), Axis()).item() == 5.0
