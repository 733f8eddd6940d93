"""How many bytes a rank sends in a step, by axis and operation: the collectives of the model's code, as formulas.

The letters are those of `megatron.plan.rank`. `megatron.parallel.traffic` counts the same where they are called.
"""

from megatron.config import Config
from megatron.parallel.data.data_parallel import BUCKET_ELEMENTS
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, Traffic
from megatron.plan.parameters import Parameter, rank_parameters, sharded_units
from megatron.plan.rank import Rank


def step_traffic(rank: Rank) -> Traffic:
    """What `rank` sends in one step."""
    traffic = Traffic()
    for stage in rank.stages:
        _tensor(traffic, rank, stage)
        _context(traffic, rank, stage)
        _pipeline(traffic, rank, stage)
        _shards(traffic, rank, stage)
    parameters = rank_parameters(rank)
    if rank.sharding == "none":
        _sums(traffic, "data", [parameter.size for parameter in parameters], rank.replicas)
    shards, shard = rank.shards, rank.shard
    _sums(traffic, "tensor", [p.share(shards, shard) for p in parameters if p.is_partial], rank.sizes["tensor"])
    _sums(traffic, "pipeline", [p.share(shards, shard) for p in parameters if p.is_at_ends], 2)
    _scalars(traffic, rank, parameters)
    return traffic


def _tensor(traffic: Traffic, rank: Rank, stage: Stage) -> None:
    """Each layer's sum over the tensor axis, or with sequence parallelism its two halves."""
    size, times = rank.sizes["tensor"], rank.num_micro_batches
    hidden, num_blocks = rank.t * rank.h * rank.e, len(stage.layers)
    again = num_forwards_again(rank.config, num_blocks)
    if rank.is_sequence_parallel:
        # Forward, a block gathers and sums twice; backward it sums twice, and gathers gradients and, again, inputs.
        traffic.add("tensor", ALL_GATHER, hidden, size, times * (6 * num_blocks + 2 * again.entered))
        traffic.add("tensor", REDUCE_SCATTER, hidden, size, times * (4 * num_blocks + again.left))
    else:
        traffic.add("tensor", ALL_REDUCE, hidden, size, times * (4 * num_blocks + again.left))
    if stage.is_first:
        embedded = rank.t * rank.h * 4
        if rank.is_sequence_parallel:
            traffic.add("tensor", REDUCE_SCATTER, embedded, size, times)
            traffic.add("tensor", ALL_GATHER, embedded, size, times)
        else:
            traffic.add("tensor", ALL_REDUCE, embedded, size, times)
    if stage.is_last:
        picked = rank.m * rank.h * rank.e
        # The targets' hidden states, with sequence parallelism; their gradients; two sums a target for the softmax.
        traffic.add("tensor", ALL_REDUCE, picked, size, times * (2 if rank.is_sequence_parallel else 1))
        traffic.add("tensor", ALL_GATHER, 8 * rank.m * size, size, times)
        traffic.add("tensor", ALL_REDUCE, 8 * rank.m, size, times)
    if rank.config.model.distribute_checkpointed_activations:
        kept = -(-rank.t * rank.h // size) * size * rank.r
        traffic.add("tensor", ALL_GATHER, kept, size, times * again.groups)


class Again:
    """How often the backward passes of a stage run parts of the forward pass again.

    `entered`, `left`: blocks, and how many of their two halves end in a sum that is computed again. Of a recomputed
    group of blocks the last sum is left out if nothing behind it, that is no dropout, keeps an activation.
    """

    def __init__(self, num_blocks: int, num_groups: int, has_dropout: bool) -> None:
        self.entered, self.groups = num_blocks, num_groups
        self.left = 2 * num_blocks - (0 if has_dropout else num_groups)


def num_forwards_again(config: Config, num_blocks: int) -> Again:
    """What a stage of `num_blocks` recomputes in a backward pass."""
    model = config.model
    if not model.checkpoint_activations:
        return Again(0, 0, True)
    return Again(num_blocks, -(-num_blocks // model.checkpoint_num_layers), model.hidden_dropout > 0)


def _context(traffic: Traffic, rank: Rank, stage: Stage) -> None:
    """Keys and values of all tokens are gathered, and their gradients summed."""
    size, model = rank.sizes["context"], rank.config.model
    keys_values = size * rank.t * 2 * rank.nd * rank.e
    is_again = model.checkpoint_activations or model.recompute_granularity == "selective"
    gathers = 1 + is_again + (not rank.takes_flash)
    times = rank.num_micro_batches * len(stage.layers)
    traffic.add("context", ALL_GATHER, keys_values, size, times * gathers)
    traffic.add("context", REDUCE_SCATTER, keys_values, size, times)


def _pipeline(traffic: Traffic, rank: Rank, stage: Stage) -> None:
    """Activations to the next stage, gradients to the one before."""
    if rank.sizes["pipeline"] > 1:
        times = rank.num_micro_batches * ((not stage.is_last) + (not stage.is_first))
        traffic.add("pipeline", SEND, rank.u * rank.h * rank.r, 2, times)


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
