"""Refuses layouts that cannot work, before anything is built, and names the nearest one that can.

Every rank decides from its own flags, so all refuse together and none waits for another. The vocabulary's size is never
a reason: it is padded, and a rank may hold no row of it.
"""

import itertools
import math
from collections.abc import Iterable

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.kernels.fp8 import Recipe, recipe_of

_PIPELINE = "--pipeline-model-parallel-size"
_CONTEXT = "--context-parallel-size"
_TENSOR = "--tensor-model-parallel-size"
_VIRTUAL = "--num-layers-per-virtual-pipeline-stage"
_FIRST = "--decoder-first-pipeline-num-layers"
_LAST = "--decoder-last-pipeline-num-layers"


def check_layout(config: Config, num_ranks: int) -> None:
    """Raises ConfigError unless `num_ranks` ranks can train the model in the layout that `config` asks for."""
    _check_tensor(config)
    if (recipe := recipe_of(config.precision)) is not None:
        _check_fp8(config, recipe)
    _check_stages(config, num_ranks)
    _check_number_of_ranks(config, num_ranks)
    _check_schedule(config, num_ranks)
    _check_sharding(config, num_ranks)
    _check_shares_of_tokens(config, num_ranks)
    if config.model.distribute_checkpointed_activations:
        _check_distributed_activations(config)


def _check_tensor(config: Config) -> None:
    size = config.parallel.tensor_model_parallel_size
    for value, name in ((config.model.num_attention_heads, "--num-attention-heads"),
                        (config.model.num_groups, "--num-query-groups"),
                        (config.model.ffn_hidden_size, "--ffn-hidden-size")):
        if value % size:
            raise ConfigError(f"{name} {value} is not divisible by {_TENSOR} {size}; the nearest size that can be is "
                              f"{_nearest(_divisors(_splits_into(config)), size)}")


def _check_shares_of_tokens(config: Config, num_ranks: int) -> None:
    parallel, tensor = config.parallel, config.parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        others = parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        sizes = _divisors(math.gcd(_splits_into(config), num_ranks // others))
        instead = f", or give {sizes[1]} there" if len(sizes) > 1 else ""
        raise ConfigError(f"--sequence-parallel shares the tokens out among tensor-parallel ranks, and {_TENSOR} is 1; "
                          f"leave it out{instead}")
    tokens = config.training.micro_batch_size * (config.data.seq_length or 0)
    neighbours, share = (config.model.qkv_conv_kernel or 1) // 2, tokens // parallel.context_parallel_size
    if parallel.context_parallel_size > 1 and neighbours > share:
        raise ConfigError(f"--qkv-conv-kernel {config.model.qkv_conv_kernel} needs {neighbours} tokens of the ranks "
                          f"beside, and each of {_CONTEXT} {parallel.context_parallel_size} has {share}; give a "
                          f"smaller size there")


def _check_fp8(config: Config, recipe: Recipe) -> None:
    """All sizes of the blocks' products on a rank, the tokens' included, over which weight gradients are summed."""
    model, parallel, tensor = config.model, config.parallel, config.parallel.tensor_model_parallel_size
    shares = parallel.context_parallel_size * (tensor if parallel.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * (config.data.seq_length or 0)
    width = model.num_attention_heads * model.kv_channels
    for size, divisor, name in (
            (model.hidden_size, 1, "--hidden-size"), (model.ffn_hidden_size or 0, tensor, "--ffn-hidden-size"),
            (width, tensor, "--num-attention-heads x --kv-channels"),
            (width + 2 * model.num_groups * model.kv_channels, tensor,
             "the width of queries, keys and values, (--num-attention-heads + 2 --num-query-groups) x --kv-channels,"),
            (tokens, shares, "--micro-batch-size x --seq-length")):
        if size % (recipe.multiple * divisor):
            over = f" x {divisor} ranks" if divisor > 1 else ""
            raise ConfigError(f"--fp8 with --fp8-recipe {config.precision.fp8_recipe} multiplies what is divisible by "
                              f"{recipe.multiple}{over}, and {name} is {size}; choose a multiple, or leave --fp8 out")


def _check_stages(config: Config, num_ranks: int) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    size, blocks = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    ends = {_FIRST: parallel.decoder_first_pipeline_num_layers, _LAST: parallel.decoder_last_pipeline_num_layers}
    given = {name: count for name, count in ends.items() if count is not None}
    others = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    fitting = [count for count in range(2, layers + 1) if num_ranks % (count * others) == 0]
    needs_pipeline = {**given, **({_VIRTUAL: blocks} if blocks else {})}
    if size == 1 and needs_pipeline:
        name, value = next(iter(needs_pipeline.items()))
        sizes = [count for count in fitting
                 if _can_share_out(layers, count, given) and not (blocks and layers % (count * blocks))]
        instead = f", or give {sizes[0]} there" if sizes else ""
        raise ConfigError(f"{name} {value} is about pipeline stages, and {_PIPELINE} is 1; leave it out{instead}")
    if size > layers:
        raise ConfigError(f"--num-layers {layers} is fewer than the stages of {_PIPELINE} {size}; the nearest size "
                          f"that can be is {layers}")
    if blocks and given:
        raise ConfigError(f"{next(iter(given))} and {_VIRTUAL} exclude each other; give one")
    if blocks and layers % (size * blocks):
        sizes = [count for count in fitting if layers % count == 0]
        remedy = (f"the nearest number is {_nearest(_divisors(layers // size), blocks)}" if layers % size == 0 else
                  f"the nearest {_PIPELINE} is {_nearest(sizes, size)}, with {_VIRTUAL} 1" if sizes else
                  f"leave {_VIRTUAL} out")
        raise ConfigError(f"{_VIRTUAL} {blocks} x {_PIPELINE} {size} does not divide --num-layers {layers}; {remedy}")
    if not _can_share_out(layers, size, given):
        shown = " and ".join(f"{name} {count}" for name, count in given.items())
        raise ConfigError(f"{shown} leave {layers - sum(given.values())} of --num-layers {layers} to "
                          f"{size - len(given)} other stages; leave them out, and the stages are balanced")


def _can_share_out(layers: int, size: int, given: dict[str, int]) -> bool:
    """Whether `size` stages can hold all layers, the ends as many as `given` and each of the others one or more."""
    left, others = layers - sum(given.values()), size - len(given)
    return left >= others if others else left == 0


def _check_number_of_ranks(config: Config, num_ranks: int) -> None:
    parallel = config.parallel
    sizes = {_PIPELINE: parallel.pipeline_model_parallel_size, _CONTEXT: parallel.context_parallel_size,
             _TENSOR: parallel.tensor_model_parallel_size}
    together = math.prod(sizes.values())
    if num_ranks % together == 0:
        return
    split = [(name, size) for name, size in sizes.items() if size > 1]
    asked = " x ".join(f"{name} {size}" for name, size in split)
    counts = [count for count in (num_ranks // together * together, (num_ranks // together + 1) * together) if count]
    nearest = _nearest_grid(config, num_ranks, tuple(sizes.values()))
    remedy = " ".join(f"{name} {nearest[list(sizes).index(name)]}" for name, _ in split)
    raise ConfigError(f"{asked} does not divide the number of ranks, {num_ranks}; start "
                      f"{' or '.join(map(str, counts))}, or give {remedy}")


def _nearest_grid(config: Config, num_ranks: int, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes (pipeline, context, tensor), none above `asked`, that fit ranks and model and are nearest to it."""
    pipelines = [size for size in _divisors(num_ranks) if size <= min(config.model.num_layers, asked[0])]
    contexts = [size for size in _divisors(num_ranks) if size <= asked[1]]
    tensors = [size for size in _divisors(math.gcd(num_ranks, _splits_into(config))) if size <= asked[2]]
    fitting = [grid for grid in itertools.product(pipelines, contexts, tensors) if num_ranks % math.prod(grid) == 0]
    return min(fitting, key=lambda grid: math.prod(asked) / math.prod(grid))


def _check_schedule(config: Config, num_ranks: int) -> None:
    parallel, training = config.parallel, config.training
    size = parallel.pipeline_model_parallel_size
    if parallel.pipeline_schedule == "zero-bubble":
        defers = "defers weight gradients past the backward pass in which"
        wrong = [(size == 1, f"fills the gaps of a pipeline, and {_PIPELINE} is 1"),
                 (parallel.num_layers_per_virtual_pipeline_stage is not None,
                  f"has one stage a rank, and {_VIRTUAL} asks for several"),
                 (parallel.data_parallel_sharding != "none",
                  f"{defers} --data-parallel-sharding {parallel.data_parallel_sharding} would sum them"),
                 (parallel.DDP_impl == "torch", f"{defers} --DDP-impl torch would sum them"),
                 (training.compile, f"{defers} a block of --compile computes them")]
        for is_wrong, why in wrong:
            if is_wrong:
                raise ConfigError(f"--pipeline-schedule zero-bubble {why}; leave one of the two out")
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return
    data_size = num_ranks // (size * parallel.context_parallel_size * parallel.tensor_model_parallel_size)
    multiple = training.micro_batch_size * data_size * size
    start, increment, _ = training.rampup_batch_size or (multiple, multiple, 0)
    global_batch = training.global_batch_size or training.micro_batch_size * data_size
    for rows, name in ((global_batch, "--global-batch-size"), (start, "--rampup-batch-size START"),
                       (increment, "--rampup-batch-size INCREMENT")):
        if rows % multiple:
            nearest = max(1, round(rows / multiple)) * multiple
            raise ConfigError(f"{_VIRTUAL}: the interleaved schedule takes micro-batches in groups of {_PIPELINE} "
                              f"{size}, and {name} {rows} is not a multiple of that x --micro-batch-size "
                              f"{training.micro_batch_size} x {data_size} data-parallel ranks; the nearest is "
                              f"{nearest}")


def _check_sharding(config: Config, num_ranks: int) -> None:
    parallel = config.parallel
    is_sharded = parallel.data_parallel_sharding != "none"
    if is_sharded and parallel.DDP_impl == "torch":
        raise ConfigError(f"--DDP-impl torch keeps everything on every rank, against --data-parallel-sharding "
                          f"{parallel.data_parallel_sharding}, which overlaps its sums by itself; leave it out")
    if parallel.shard_within is None:
        return
    replicas = num_ranks // (parallel.pipeline_model_parallel_size * parallel.tensor_model_parallel_size)
    sizes = _divisors(replicas)[1:]
    if parallel.shard_within == 1:
        instead = f", or give {sizes[0]}" if sizes else ""
        raise ConfigError(f"--shard-within 1 shares nothing out; leave it out{instead}")
    if replicas % parallel.shard_within:
        remedy = f"the nearest number is {_nearest(sizes, parallel.shard_within)}" if sizes else "leave it out"
        raise ConfigError(f"--shard-within {parallel.shard_within} does not divide the {replicas} ranks that hold the "
                          f"same parameters; {remedy}")
    if not is_sharded:
        raise ConfigError(f"--shard-within {parallel.shard_within} says among whom to share out, and "
                          "--data-parallel-sharding is none; give optimizer, gradients or parameters there")


def _check_distributed_activations(config: Config) -> None:
    name, size = "--distribute-checkpointed-activations", config.parallel.tensor_model_parallel_size
    if size == 1:
        raise ConfigError(f"{name} shares activations out among tensor-parallel ranks, and {_TENSOR} is 1; leave it "
                          "out")
    if config.parallel.sequence_parallel:
        raise ConfigError(f"{name} has nothing to add to --sequence-parallel, which keeps each rank's tokens only; "
                          "leave it out")
    if not config.model.checkpoint_activations:
        raise ConfigError(f"{name} is about what --checkpoint-activations keeps; give both, or neither")


def _splits_into(config: Config) -> int:
    """A number each of whose divisors is a tensor-parallel size that the model can have."""
    return math.gcd(config.model.num_groups, config.model.ffn_hidden_size)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _nearest(candidates: Iterable[int], size: int) -> int:
    return min(candidates, key=lambda candidate: (abs(candidate - size), candidate))
