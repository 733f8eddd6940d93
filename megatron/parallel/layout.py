"""Which grids of ranks can work: refused before anything is built, with the nearest grid that can.

Every rank comes to the same verdict from its own flags, so all refuse together and none waits for another.
"""

import math

from megatron.config import Config, ConfigError


def check_layout(config: Config, num_ranks: int) -> None:
    """Raises ConfigError unless `num_ranks` ranks can train the model in the layout that `config` asks for."""
    model, parallel = config.model, config.parallel
    size = parallel.tensor_model_parallel_size
    flag = f"--tensor-model-parallel-size {size}"
    heads, width = model.num_attention_heads, model.ffn_hidden_size
    splits_into = math.gcd(heads, width)
    for value, name in ((heads, "--num-attention-heads"), (width, "--ffn-hidden-size")):
        if value % size:
            raise ConfigError(f"{name} {value} is not divisible by {flag}; the nearest size that can be is "
                              f"{_nearest_divisor(splits_into, size)}")
    if num_ranks % size:
        counts = [count for count in (num_ranks // size * size, (num_ranks // size + 1) * size) if count]
        raise ConfigError(f"{flag} does not divide the number of ranks, {num_ranks}; "
                          f"start {' or '.join(map(str, counts))}, or give --tensor-model-parallel-size "
                          f"{_nearest_divisor(math.gcd(splits_into, num_ranks), size)}")
    if parallel.sequence_parallel and size == 1:
        raise ConfigError("--sequence-parallel shares the tokens out among tensor-parallel ranks, and "
                          "--tensor-model-parallel-size is 1; leave it out, or give "
                          f"{_smallest_divisor(splits_into)} there")
    if model.distribute_checkpointed_activations:
        _check_distributed_activations(config)


def _check_distributed_activations(config: Config) -> None:
    name, size = "--distribute-checkpointed-activations", config.parallel.tensor_model_parallel_size
    if not config.model.checkpoint_activations:
        raise ConfigError(f"{name} is about what --checkpoint-activations keeps; give both, or neither")
    if size == 1:
        raise ConfigError(f"{name} shares activations out among tensor-parallel ranks, and "
                          "--tensor-model-parallel-size is 1; leave it out")
    if config.parallel.sequence_parallel:
        raise ConfigError(f"{name} has nothing to add to --sequence-parallel, which keeps each rank's tokens only; "
                          "leave it out")


def _nearest_divisor(number: int, size: int) -> int:
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - size), divisor))


def _smallest_divisor(number: int) -> int:
    """The smallest divisor above 1, or 1."""
    return next((candidate for candidate in range(2, number + 1) if number % candidate == 0), 1)
