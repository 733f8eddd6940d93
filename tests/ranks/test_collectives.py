"""What each collective does forward and backward, and the random numbers of split and of whole tensors."""


import pytest
import torch
from torch import nn

from megatron.parallel.collectives import sum_gradients, sum_outputs, sum_to_slices
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import BIAS, replicated_parameter, split_parameter
from megatron.parallel.placement import gradient_norm, placement_of
from megatron.parallel.tensor.stream import Stream
from tests.ranks.launch import run_ranks
from tests.wholes import wholes

RANKS = 2
CPU = torch.device("cpu")


def forward_and_backward(axis, collective):
    """The output for inputs 1, 2, … times the rank's number from 1, and the gradient for output gradients likewise."""
    x = ((axis.rank + 1) * torch.arange(1., 5.)).requires_grad_()
    y = collective(x * 1, axis)
    output = y.detach().clone()
    y.backward((axis.rank + 1) * torch.arange(1., 1 + len(y)))
    return [output.tolist(), x.grad.tolist()]


@pytest.mark.parametrize(("collective", "outputs", "gradients"), [
    (sum_gradients, [[1, 2, 3, 4], [2, 4, 6, 8]], [[3, 6, 9, 12], [3, 6, 9, 12]]),
    (sum_outputs, [[3, 6, 9, 12], [3, 6, 9, 12]], [[1, 2, 3, 4], [2, 4, 6, 8]]),
    (sum_to_slices, [[3, 6], [9, 12]], [[1, 2, 2, 4], [1, 2, 2, 4]]),
])
def test_a_collective_does_what_its_docstring_says(collective, outputs, gradients):
    results = run_ranks(forward_and_backward, RANKS, collective)
    assert [output for output, _ in results] == outputs
    assert [gradient for _, gradient in results] == gradients


@pytest.mark.parametrize("collective", [sum_gradients, sum_outputs, sum_to_slices])
def test_on_one_rank_a_collective_gives_back_its_input(collective):
    x = torch.randn(4)
    assert collective(x, Axis()) is x


def picked_rows(axis):
    stream, hidden = Stream(axis, is_split=True), torch.arange(12.).view(6, 2)
    mine = stream.tokens(hidden).clone().requires_grad_()
    rows = stream.pick(mine, torch.tensor([5, 0, 5]))
    output = rows.detach().clone()
    rows.backward(torch.ones(3, 2))
    return [output.tolist(), mine.grad[:, 0].tolist()]


def test_rows_are_picked_from_whichever_rank_has_them():
    results = run_ranks(picked_rows, RANKS)
    assert [rows for rows, _ in results] == [[[10, 11], [0, 1], [10, 11]]] * RANKS
    assert [gradient for _, gradient in results] == [[1, 0, 0], [0, 0, 2]]


def through_a_checkpoint(axis):
    """The wholes of four parameters and of a scalar, and whether their parts are what was there."""
    whole = {"rows": torch.arange(12.).view(6, 2), "columns": torch.arange(8.).view(2, 4),
             "padded": torch.arange(3.), "replicated": torch.arange(5.), "exp_avg/rows": torch.ones(6, 2),
             "step/rows": torch.tensor(7.)}
    parameters = {"rows": split_parameter((6, 2), 0, axis, BIAS), "columns": split_parameter((2, 4), 1, axis, BIAS),
                  "padded": split_parameter((3,), 0, axis, BIAS, local_size=4),
                  "replicated": replicated_parameter((5,), axis, BIAS, has_partial_gradient=False)}
    local = {key: placement_of(parameter).cut(tensor, parameter) for key, tensor in whole.items()
             for parameter in [parameters[key.split("/")[-1]]]}
    assert all(local[name].shape == parameter.shape for name, parameter in parameters.items())
    again = wholes(local, parameters)
    return [all(torch.equal(again[name], tensor) for name, tensor in whole.items()),
            local["padded"].tolist()]


def test_parts_are_boxes_that_make_up_the_same_wholes_again():
    assert run_ranks(through_a_checkpoint, RANKS) == [[True, [0, 1, 2, 0]], [True, [0, 0, 0, 0]]]


def norm_of_gradients(axis):
    parameters = [split_parameter((4,), 0, axis, BIAS), nn.Parameter(torch.empty(2)),
                  replicated_parameter((1,), axis, BIAS, has_partial_gradient=False)]
    wholes_of = [torch.tensor([1., 2., 3., 4.]), torch.tensor([6., 7.]), torch.tensor([5.])]
    for parameter, gradient in zip(parameters, wholes_of, strict=True):
        parameter.grad = placement_of(parameter).cut(gradient, parameter)
    return gradient_norm(parameters)


def test_the_norm_counts_each_element_once():
    assert norm_of_gradients(Axis()).item() == pytest.approx(140**0.5)
    assert [norm.item() for norm in run_ranks(norm_of_gradients, RANKS)] == pytest.approx([140**0.5] * RANKS)
