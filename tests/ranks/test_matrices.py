"""Whole matrices, assembled from the ranks' parts and split again, agree with those of one rank."""

import itertools
from unittest.mock import patch

import pytest
import torch

from megatron.config import ParallelConfig
from megatron.parallel.matrices import exchange, sharing
from megatron.parallel.matrices.exchange import WholeMatrices
from megatron.parallel.mesh import Axis, Mesh, build_mesh
from megatron.parallel.parameters import Normal, declaration_of, matrix
from megatron.parallel.placement import Placement
from megatron.parallel.traffic import TrafficCounter
from tests.ranks.launch import TIMEOUT, run_ranks

# Shape, dimension that is split over tensor ranks, runs of rows. Shares cut turns in two, and one of two may be empty.
PARAMETERS = [((5, 4), None, ()), ((4, 5), None, ()), ((5, 8), 1, ()), ((20, 3), 0, (2, 1, 2)), ((1, 4), 1, ()),
              ((10, 3), 0, (1, 4)), ((8, 5), 0, ())]
MESHES = {"tp2, dp2 sharded": ParallelConfig(tensor_model_parallel_size=2, data_parallel_sharding="parameters"),
          "tp2, dp2": ParallelConfig(tensor_model_parallel_size=2),
          "dp4 sharded within 2": ParallelConfig(data_parallel_sharding="optimizer", shard_within=2),
          "tp4": ParallelConfig(tensor_model_parallel_size=4), "dp4": ParallelConfig()}


def wholes():
    torch.manual_seed(0)
    return [torch.randn(shape) for shape, _, _ in PARAMETERS]


def part(whole, dim, runs, mesh):
    """A rank's part of a parameter; one that the tensor ranks cannot split they all hold."""
    dim = dim if dim is not None and whole.shape[dim] % (mesh.tensor.size * max(1, sum(runs))) == 0 else None
    local = whole if dim is None else whole.chunk(mesh.tensor.size, dim)[mesh.tensor.rank]
    placement = Placement(mesh.tensor, dim, whole.shape[dim] if dim is not None else 0, shards=mesh.shards,
                          num_rows=len(local))
    size = -(-len(local) // mesh.shards.size)
    local = local[mesh.shards.rank * size:(mesh.shards.rank + 1) * size].clone()
    local.placement, local.declaration = placement, matrix(Normal(0.02), runs)
    return local


def worked_on(mesh, dtype):
    """Of each parameter this rank's part of what comes back, and the squares of rows."""
    parts = [part(whole, dim, runs, mesh) for whole, (_, dim, runs) in zip(wholes(), PARAMETERS, strict=True)]
    matrices = WholeMatrices(parts, mesh, dtype, with_squares=True)
    back = {}
    for results in matrices.worked_on(parts, lambda stack: stack / stack.norm(dim=(1, 2), keepdim=True)):
        number = results[0].matrix.parameter
        assert len(results) == max(1, len(declaration_of(parts[number]).runs))
        back[number] = (matrices.joined(number, [result.part for result in results]),
                        [result.squares for result in results])
    assert back.keys() == set(range(len(parts)))
    return back, parts


def compared(axis, config, most_elements, dtype):
    """The largest error on this rank, and how much it has sent."""
    mesh = build_mesh(config, torch.device("cpu"), TIMEOUT)
    with TrafficCounter(mesh) as counter, patch.object(sharing, "MOST_ELEMENTS", most_elements):
        back, parts = worked_on(mesh, dtype)
    expected, _ = worked_on(Mesh(), dtype)
    errors = [0.0]
    for number, (found, squares) in back.items():
        _, dim, runs = PARAMETERS[number]
        mine = part(expected[number][0], dim, runs, mesh)
        assert found.shape == parts[number].shape == mine.shape
        errors.append(float((found - mine).norm()))
        errors += [float((one - other).norm()) for one, other in zip(squares, expected[number][1], strict=True)]
    return max(errors), counter.traffic.sent.total()


@pytest.mark.parametrize(("most_elements", "dtype"), [(16, torch.float32), (sharing.MOST_ELEMENTS, torch.bfloat16)])
@pytest.mark.parametrize("name", MESHES)
def test_parts_come_back_as_of_the_whole_on_one_rank(name, most_elements, dtype):
    outcomes = run_ranks(compared, 4, MESHES[name], most_elements, dtype)
    assert max(error for error, _ in outcomes) < 1e-6
    assert all(sent > 0 for _, sent in outcomes)


def test_on_one_rank_each_run_of_rows_is_a_matrix():
    back, _ = worked_on(Mesh(), torch.float32)
    for number, (whole, (_, _, runs)) in enumerate(zip(wholes(), PARAMETERS, strict=True)):
        runs = runs or (len(whole),)
        found, expected = (each.view(-1, sum(runs), whole.shape[1]).split(runs, 1) for each in (back[number][0], whole))
        for one, other, squares in zip(found, expected, back[number][1], strict=True):
            torch.testing.assert_close(one, other / other.norm())
            torch.testing.assert_close(squares, one.flatten(0, 1).square().mean(1))


def test_as_much_work_goes_to_every_rank():
    mesh = Mesh(holders=Axis(0, 3), copies=Axis(0, 3))
    parameters = [part(torch.empty(size, 64), None, (), Mesh()) for size in (64, 16, 32, 64, 64, 64, 16, 32, 64, 64)]
    work = [0, 0, 0]
    for one in sharing.shared_out(parameters, mesh):
        work[one.owner] += min(one.shape) ** 2
        assert list(one.givers) == [one.owner]
    assert max(work) < 1.2 * min(work)


def test_messages_of_one_round_are_under_way_while_another_is_worked_on(monkeypatch):
    happened, numbers = [], itertools.count()

    class Message:
        def __init__(self, num_elements):
            self.number, self.num_elements = next(numbers), num_elements
            happened.append(f"{self.number} sent")

        def wait(self):
            happened.append(f"{self.number} there")
            return torch.zeros(self.num_elements)

    def work(stack):
        happened.append("work")
        return stack

    monkeypatch.setattr(exchange, "start_exchange", lambda tensor, to_each, from_each, axis: Message(sum(from_each)))
    monkeypatch.setattr(sharing, "MOST_ELEMENTS", 1)
    axis = Axis(size=2)
    mesh = Mesh(tensor=axis, holders=axis)
    parts = [part(torch.ones(2, size), 1, (), mesh) for size in (2, 2, 4, 4, 6, 6)]  # two of a shape, one a rank
    list(WholeMatrices(parts, mesh, torch.float32, with_squares=False).worked_on(parts, work))
    # 0, 1 and 3 are on the way to the owners; 2, 4 and 5 on the way back.
    assert happened == ["0 sent", "1 sent", "0 there", "work", "2 sent", "3 sent", "1 there", "work", "4 sent",
                        "2 there", "3 there", "work", "5 sent", "4 there", "5 there"]
