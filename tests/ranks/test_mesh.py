"""The process groups of a mesh of ranks, made by a real process group."""

import time
from datetime import timedelta

import torch

from megatron.config import ParallelConfig
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis, build_axis, build_mesh
from tests.ranks.launch import TIMEOUT, TIMEOUT_S, run_ranks

GRID = {"data": 2, "tensor": 2}


def places_and_sums(axis):
    axes = [build_axis(GRID, [name], TIMEOUT) for name in GRID]
    return [(each.rank, each.size, all_reduce_sum(torch.tensor(10**axis.rank), each).item()) for each in axes]


def test_each_rank_sums_with_its_row_and_its_column_of_the_grid():
    assert run_ranks(places_and_sums, 4) == [[(0, 2, 101), (0, 2, 11)], [(0, 2, 1010), (1, 2, 11)],
                                             [(1, 2, 101), (0, 2, 1100)], [(1, 2, 1010), (1, 2, 1100)]]


def one_axis_is_the_world(axis):
    grid = {"data": 1, "tensor": 2}
    return build_axis(grid, ["data"], TIMEOUT) == Axis() and build_axis(grid, ["tensor"], TIMEOUT) == axis


def test_an_axis_of_all_ranks_is_the_world_and_one_of_a_single_rank_has_no_group():
    assert run_ranks(one_axis_is_the_world, 2) == [True, True]


def who_is_with_whom(axis):
    """For meshes of several layouts in one process: the ranks' numbers, summed as digits, along each axis."""
    layouts = [ParallelConfig(pipeline_model_parallel_size=4),
               ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2),
               ParallelConfig(data_parallel_sharding="optimizer", shard_within=2)]
    sums = []
    for config in layouts:
        mesh = build_mesh(config, torch.device("cpu"), TIMEOUT)
        axes = (mesh.pipeline, mesh.data, mesh.context, mesh.replicas, mesh.shards, mesh.copies, mesh.ends)
        sums.append([all_reduce_sum(torch.tensor(10**axis.rank), each).item() for each in axes])
    return sums


def test_several_meshes_live_in_one_process_and_each_axis_joins_the_ranks_that_it_names():
    first, *_, last = run_ranks(who_is_with_whom, 4)
    assert first == [[1111, 1, 1, 1, 1, 1, 1001], [101, 1, 11, 11, 1, 11, 101], [1, 1111, 1, 1111, 11, 101, 1]]
    assert last == [[1111, 1000, 1000, 1000, 1000, 1000, 1001], [1010, 1000, 1100, 1100, 1000, 1100, 1010],
                    [1000, 1111, 1000, 1111, 1100, 1010, 1000]]


def seconds_waited(axis):
    tensor = build_axis(GRID, ["tensor"], timedelta(seconds=1))
    began_s, waited_s = time.monotonic(), None
    if axis.rank == 0:
        try:
            all_reduce_sum(torch.zeros(1), tensor)
        except RuntimeError:
            waited_s = time.monotonic() - began_s
    all_reduce_sum(torch.zeros(1), axis)  # the others are alive, but not taking part
    return waited_s


def test_the_timeout_reaches_the_groups_of_the_axes():
    waited_s, *_ = run_ranks(seconds_waited, 4)
    assert 0.9 < waited_s < TIMEOUT_S / 2
