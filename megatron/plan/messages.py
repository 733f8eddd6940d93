"""Computes how many bytes a rank sends in a step, by axis and operation, without running the step.

Messages inside the pieces of the model are measured (`pieces`); those around them are derived here. In a real run or a
dry run, `megatron.parallel.traffic` counts the same.
"""

from collections import Counter
from functools import cache

from megatron.parallel.data.sums import in_buckets
from megatron.parallel.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, Traffic
from megatron.plan.muon import muon_traffic
from megatron.plan.parameters import Held, sharded_units
from megatron.plan.rank import PlannedStage, Rank


def step_traffic(rank: Rank) -> Traffic:
    """All that `rank` sends in one step."""
    traffic = Traffic()
    for stage in rank.stages:
        _passes(traffic, rank, stage)
        _shards(traffic, rank, stage)
    parameters, shards = rank.held.trained, (rank.shards, rank.shard)
    if rank.sharding == "none":
        traffic.include(_sums("data", parameters, "size", shards, rank.replicas))
    traffic.include(_sums("tensor", parameters, "is_partial", shards, rank.sizes["tensor"]))
    traffic.include(_sums("pipeline", parameters, "is_at_ends", shards, 2))
    traffic.include(muon_traffic(rank))
    _scalars(traffic, rank, parameters)
    return traffic


def _passes(traffic: Traffic, rank: Rank, stage: PlannedStage) -> None:
    """Add the model's collectives, and the messages of activations and gradients between stages."""
    times = rank.num_micro_batches
    traffic.include(stage.traffic, times)
    if rank.sizes["pipeline"] > 1:
        traffic.add("pipeline", SEND, stage.sent, 2, times * (not stage.part.is_last))
        traffic.add("pipeline", SEND, stage.received, 2, times * (not stage.part.is_first))


def _shards(traffic: Traffic, rank: Rank, stage: PlannedStage) -> None:
    """Add the all-gathers of sharded parameters and the reductions of their gradients."""
    if rank.sharding == "none":
        return
    times = rank.num_micro_batches
    gathers = 2 * times if rank.sharding == "parameters" else 1
    scatters = 1 if rank.sharding == "optimizer" else times
    for size, count in _whole_units(stage.held, rank.shards).items():
        traffic.add("data", ALL_GATHER, rank.width * size, rank.shards, gathers * count)
    for size, count in _whole_units(stage.held.trained, rank.shards).items():
        traffic.add("data", REDUCE_SCATTER, 4 * size, rank.shards, scatters * count)
        traffic.add("data", ALL_REDUCE, 4 * size // rank.shards, rank.replicas // rank.shards, count)


@cache
def _whole_units(held: Held, shards: int) -> Counter[int]:
    """The number of sharded units of each size, in elements."""
    return Counter(sharded_units(held, shards).values())


@cache
def _sums(axis: str, held: Held, which: str, shards: tuple[int, int], num_ranks: int) -> Traffic:
    """The bucketed all-reduce of fp32 gradients, for the parameters whose attribute `which` is true."""
    traffic = Traffic()
    for bucket in buckets(held, which, shards):
        traffic.add(axis, ALL_REDUCE, 4 * bucket, num_ranks)
    return traffic


@cache
def buckets(held: Held, which: str = "size", shards: tuple[int, int] = (1, 0)) -> list[int]:
    """The number of elements in each all-reduce bucket, for the parameters whose attribute `which` is true.

    `shards`: the number of shards and this rank's, of which only its share of each parameter counts.
    """
    sizes = (parameter.share(*shards) for parameter in held if getattr(parameter, which))
    return [sum(bucket) for bucket in in_buckets(sizes, int)]


def _scalars(traffic: Traffic, rank: Rank, parameters: Held) -> None:
    """Add the all-reduces of single numbers: counts of targets and wishes to stop or save, and the gradient norm.

    With --on-spike skip, also of the loss, by which steps are judged before the update; with delayed scaling in FP8, of
    the largest magnitudes of each layer's input and gradient.
    """
    sizes = {**rank.sizes, "data": rank.replicas}
    axis = next((axis for axis in sizes if sizes[axis] == rank.num_ranks), "world")
    traffic.add(axis, ALL_REDUCE, 24, rank.num_ranks)
    if rank.config.guards.on_spike == "skip":
        traffic.add(axis, ALL_REDUCE, 8, rank.num_ranks)
    for is_split in _kinds_of_norm(parameters, rank.place["pipeline"] > 0):
        traffic.add("tensor", ALL_REDUCE, 4, rank.sizes["tensor"] if is_split else 1)
        traffic.add("data", ALL_REDUCE, 4, rank.shards)
    traffic.add("pipeline", ALL_REDUCE, 4, rank.sizes["pipeline"])
    num_delayed = sum(parameter.has_history for parameter in rank.held)
    if num_delayed:
        traffic.add("tensor", ALL_REDUCE, 8 * num_delayed, rank.sizes["tensor"])
        traffic.add("data", ALL_REDUCE, 8 * num_delayed, rank.replicas)


@cache
def _kinds_of_norm(held: Held, is_later: bool) -> set[bool]:
    """The values of `is_split` among the parameters that this rank counts in the gradient norm.

    `is_later`: not on the first pipeline rank, which alone counts parameters that both ends hold.
    """
    return {parameter.is_split for parameter in held if not (parameter.is_at_ends and is_later)}
