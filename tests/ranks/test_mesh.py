"""The groups of a grid of ranks, as a real process group makes them."""

import time
from datetime import timedelta

import torch

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis, build_axes
from tests.ranks.launch import run_ranks


def places_and_sums(axis):
    axes = build_axes({"data": 2, "tensor": 2}, timedelta(seconds=30))
    return [(axes[name].rank, axes[name].size, all_reduce_sum(torch.tensor(10**axis.rank), axes[name]).item())
            for name in ("data", "tensor")]


def test_each_rank_sums_with_its_row_and_its_column_of_the_grid():
    assert run_ranks(places_and_sums, 4) == [[(0, 2, 101), (0, 2, 11)], [(0, 2, 1010), (1, 2, 11)],
                                             [(1, 2, 101), (0, 2, 1100)], [(1, 2, 1010), (1, 2, 1100)]]


def one_axis_is_the_world(axis):
    axes = build_axes({"data": 1, "tensor": 2}, timedelta(seconds=30))
    return axes["data"] == Axis() and axes["tensor"] == axis


def test_an_axis_of_all_ranks_is_the_world_and_one_of_a_single_rank_has_no_group():
    assert run_ranks(one_axis_is_the_world, 2) == [True, True]


def seconds_waited(axis):
    axes = build_axes({"data": 2, "tensor": 2}, timedelta(seconds=1))
    began_s = time.monotonic()
    if axis.rank == 0:
        try:
            all_reduce_sum(torch.zeros(1), axes["tensor"])
        except RuntimeError:
            return time.monotonic() - began_s
    time.sleep(3)  # alive, but not taking part
    return None


def test_the_timeout_reaches_the_groups_of_the_axes():
    waited_s, *_ = run_ranks(seconds_waited, 4)
    assert 0.9 < waited_s < 3
