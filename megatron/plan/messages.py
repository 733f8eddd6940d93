"""How many bytes a rank sends in a step, by axis and operation: those of the model's pieces, measured, and what is
sent around them. `megatron.parallel.traffic` counts the same where they are called.
"""

from collections import Counter

from megatron.parallel.data.data_parallel import BUCKET_ELEMENTS
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, Traffic
from megatron.plan.parameters import Parameter, rank_parameters, sharded_units
from megatron.plan.rank import Rank


def step_traffic(rank: Rank) -> Traffic:
    """What `rank` sends in one step."""
    traffic = Traffic()
    for stage in rank.stages:
        _passes(traffic, rank, stage)
        _shards(traffic, rank, stage)
    parameters = rank_parameters(rank)
    if rank.sharding == "none":
        _sums(traffic, "data", [parameter.size for parameter in parameters], rank.replicas)
    shards, shard = rank.shards, rank.shard
    _sums(traffic, "tensor", [p.share(shards, shard) for p in parameters if p.is_partial], rank.sizes["tensor"])
    _sums(traffic, "pipeline", [p.share(shards, shard) for p in parameters if p.is_at_ends], 2)
    _scalars(traffic, rank, parameters)
    return traffic


def _passes(traffic: Traffic, rank: Rank, stage: Stage) -> None:
    """The collectives of the model; activations to the next stage, gradients to the one before."""
    times = rank.num_micro_batches
    for piece, count in Counter(rank.pieces(stage)).items():
        for key, calls in piece.traffic.calls.items():
            traffic.calls[key] += times * count * calls
            traffic.sent[key] += times * count * piece.traffic.sent[key]
    if rank.sizes["pipeline"] > 1:
        ways = (not stage.is_last) + (not stage.is_first)
        traffic.add("pipeline", SEND, rank.hidden_bytes, 2, times * ways)


def _shards(traffic: Traffic, rank: Rank, stage: Stage) -> None:
    """What is shared out is gathered where it is used, and its gradients are summed to their owners."""
    if rank.sharding == "none":
        return
    times = rank.num_micro_batches
    gathers = 2 * times if rank.sharding == "parameters" else 1
    scatters = 1 if rank.sharding == "optimizer" else times
    for unit in sharded_units(rank, stage):
        whole = 4 * unit.padded_size
        traffic.add("data", ALL_GATHER, whole, rank.shards, gathers)
        traffic.add("data", REDUCE_SCATTER, whole, rank.shards, scatters)
        traffic.add("data", ALL_REDUCE, whole // rank.shards, rank.replicas // rank.shards)


def _sums(traffic: Traffic, axis: str, sizes: list[int], num_ranks: int) -> None:
    """Gradients (fp32) summed in buckets."""
    for bucket in buckets(sizes):
        traffic.add(axis, ALL_REDUCE, 4 * sum(bucket), num_ranks)


def buckets(sizes: list[int]) -> list[list[int]]:
    """Gradients of these sizes, in order, in buckets of about BUCKET_ELEMENTS."""
    found: list[list[int]] = []
    for size in sizes:
        if not found or sum(found[-1]) + size > BUCKET_ELEMENTS:
            found.append([])
        found[-1].append(size)
    return found


def _scalars(traffic: Traffic, rank: Rank, parameters: list[Parameter]) -> None:
    """The numbers of targets and of ranks that want to stop; the squares that the gradient's norm is made of."""
    sizes = {**rank.sizes, "data": rank.replicas}
    axis = next((axis for axis in sizes if sizes[axis] == rank.num_ranks), "world")
    traffic.add(axis, ALL_REDUCE, 16, rank.num_ranks)
    counted = [p for p in parameters if not (p.is_at_ends and rank.place["pipeline"] > 0)]
    if any(p.is_split for p in counted):
        traffic.add("tensor", ALL_REDUCE, 4, rank.sizes["tensor"])
        traffic.add("data", ALL_REDUCE, 4, rank.shards)
    if any(not p.is_split for p in counted):
        traffic.add("data", ALL_REDUCE, 4, rank.shards)
    traffic.add("pipeline", ALL_REDUCE, 4, rank.sizes["pipeline"])
