"""Ranks with different flags or files are refused on all ranks, with the values of two of them."""

import socket
from dataclasses import replace

from megatron.config import CheckpointConfig, Config, DataConfig, LoggingConfig, ParallelConfig, ScheduleConfig
from megatron.errors import ConfigError
from megatron.parallel.sameness import check_same, check_same_flags
from tests.ranks.launch import run_ranks

HOST = socket.gethostname()


def refusal(check):
    try:
        check()
    except ConfigError as error:
        return str(error)
    return ""


def refusals(axis, configs):
    return [refusal(lambda of_ranks=of_ranks: check_same_flags(of_ranks[axis.rank].sections(), axis))
            for of_ranks in configs]


def test_all_ranks_name_the_first_flag_that_differs_and_where_it_has_which_value():
    one = Config(schedule=ScheduleConfig(lr=1e-3), data=DataConfig(data_path=("a",)))
    rate, seed = (replace(one, schedule=ScheduleConfig(lr=2e-3)),
                  replace(one, training=replace(one.training, seed=1, eval_at_start=True)))
    without = replace(one, data=DataConfig())
    for found in run_ranks(refusals, 3, [(one, one, rate), (one, seed, rate), (one, without, one)]):
        texts = [text.split("; ")[0] for text in found]
        assert texts == [
            f"--lr differs between ranks: rank 0 on {HOST} has 0.001, rank 2 on {HOST} has 0.002",
            f"--eval-at-start differs between ranks: rank 0 on {HOST} has off, rank 1 on {HOST} has on",
            f"--data-path differs between ranks: rank 0 on {HOST} has a, rank 1 on {HOST} has none"]


def test_what_concerns_one_process_or_host_may_differ():
    here = Config(data=DataConfig(data_path=("/here/corpus",), num_workers=4), checkpoint=CheckpointConfig(save="here"))
    there = Config(data=DataConfig(data_path=("/there/corpus",), data_cache_path="/tmp"),
                   checkpoint=CheckpointConfig(save="there"), parallel=ParallelConfig(local_rank=1),
                   logging=LoggingConfig(metrics_port=0, profile=True))
    assert run_ranks(refusals, 2, [(here, there)]) == [[""], [""]]


def of_values(axis, of_ranks):
    compared, told = of_ranks[axis.rank]
    return refusal(lambda: check_same(compared, told, axis, "copy them"))


def test_contents_are_compared_and_paths_are_told():
    same, other = ({"data": [["1"], ["abc"]]}, {"data": "/a"}), ({"data": [["1"], ["abd"]]}, {"data": "/b"})
    assert run_ranks(of_values, 2, [same, (same[0], {"data": "/b"})]) == ["", ""]
    assert run_ranks(of_values, 2, [same, other]) == [
        f"data differs between ranks: rank 0 on {HOST} has /a, rank 1 on {HOST} has /b; copy them"] * 2
