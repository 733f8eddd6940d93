"""Searches all layouts in which a number of GPUs can train a model, and ranks them by estimated speed."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron.config import Config, ParallelConfig
from megatron.config.declaration import as_given, in_words
from megatron.errors import ConfigError
from megatron.log import number_of
from megatron.parallel.layout import check_layout
from megatron.parallel.mesh import grid_sizes
from megatron.parallel.traffic import Traffic
from megatron.plan.gpus import gpu_named, peak_tflops
from megatron.plan.memory import Memory, peak_memory
from megatron.plan.messages import step_traffic
from megatron.plan.rank import Rank
from megatron.plan.step_time import StepTime, step_time

# The flags that fix a part of the layout: if the user gives one, no other value is tried.
SETTLED_BY = {
    "tensor": ("--tensor-model-parallel-size", "--model-parallel-size"),
    "sequence": ("--sequence-parallel", "--no-sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size",),
    "schedule": ("--pipeline-schedule", "--num-layers-per-virtual-pipeline-stage"),
    "context": ("--context-parallel-size",),
    "sharding": ("--data-parallel-sharding", "--use-distributed-optimizer", "--DDP-impl"),
    "recompute": ("--checkpoint-activations", "--no-checkpoint-activations", "--recompute-activations",
                  "--recompute-granularity"),
    "rows": ("--micro-batch-size", "--batch-size"),
}
# The fields of a layout, besides those of recomputation, in the order in which their flags are told.
_LAYOUT = ("micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
           "context_parallel_size", "sequence_parallel", "pipeline_schedule", "num_layers_per_virtual_pipeline_stage",
           "data_parallel_sharding", "DDP_impl")
_MOST_ROWS = 16  # of the powers of two that are tried; more rows in a micro-batch are no faster
_WORTHWHILE = 0.95  # selective recomputation is tried if it reduces what a block keeps to less than this share
_CONTEXTS = (2, 4, 8, 16)  # context-parallel sizes, tried in turn if nothing fits without


@dataclass(frozen=True)
class Plan:
    """A layout and its cost: `memory` of the rank that needs most, `traffic` of the first rank.

    `sizes`: the number of ranks along each axis.
    """

    config: Config
    sizes: dict[str, int]
    memory: Memory
    traffic: Traffic
    time: StepTime


@dataclass(frozen=True)
class Machine:
    """`num_gpus` of the GPU `name`, `gpus_per_node` on each host; `margin`: the share of memory to leave free."""

    name: str
    num_gpus: int
    gpus_per_node: int
    margin: float

    @property
    def memory(self) -> float:
        """Bytes of a GPU that a layout may use."""
        return gpu_named(self.name).memory_gib * 2**30 * (1 - self.margin)


def best_plans(config: Config, machine: Machine, given: Collection[str]) -> list[Plan]:
    """Every layout that fits, the fastest first; raises ConfigError if there is none.

    `given`: the flags that the user gave, whose values are kept.
    """
    if config.precision.precision == "auto":  # means bf16 on all of these GPUs
        bf16: dict[str, Any] = {"precision": None, "bf16": True}
        config = replace(config, precision=replace(config.precision, **bf16))
    peak_tflops(gpu_named(machine.name), config.precision)
    if config.training.global_batch_size is None:
        raise ConfigError("--global-batch-size is missing; layouts are compared by the time of a step of so many rows")
    settled = {part for part, flags in SETTLED_BY.items() if any(flag in given for flag in flags)}
    contexts = (None,) if "context" in settled else (None, *_CONTEXTS)
    least: Memory | None = None
    for context in contexts:
        one = config if context is None else _with_parallel(config, context_parallel_size=context)
        plans, tightest = _fitting(one, machine, settled)
        if plans:
            return sorted(plans, key=lambda plan: plan.time.step_s)
        least = min((memory for memory in (least, tightest) if memory), key=lambda memory: memory.peak, default=None)
    if least is None:
        check_layout(config, machine.num_gpus)  # raises if the flags are wrong
        raise ConfigError(f"no layout of {number_of(machine.num_gpus, 'GPU')} divides --global-batch-size "
                          f"{config.training.global_batch_size}; give a multiple of it")
    raise ConfigError(f"nothing fits: the least that a layout of {number_of(machine.num_gpus, 'GPU')} holds is "
                      f"{least.peak / 2**30:.1f} GiB a GPU, and {machine.name} leaves {machine.memory / 2**30:.1f} "
                      "GiB; take more GPUs, larger ones, or a shorter --seq-length")


def _fitting(config: Config, machine: Machine, settled: set[str]) -> tuple[list[Plan], Memory | None]:
    """The layouts that fit, and the smallest peak memory of all possible layouts (None if there are none)."""
    plans, least = [], None
    gpu = gpu_named(machine.name)
    for candidate in candidates(config, machine, settled):
        ranks = _extreme_ranks(candidate, machine.num_gpus)
        memory = max((peak_memory(rank) for rank in ranks), key=lambda memory: memory.peak)
        if least is None or memory.peak < least.peak:
            least = memory
        if memory.peak <= machine.memory:
            traffics = [step_traffic(rank) for rank in ranks]
            plans.append(Plan(candidate, ranks[0].sizes, memory, traffics[0],
                              step_time(ranks, traffics, gpu, machine.gpus_per_node)))
    return plans, least


def candidates(config: Config, machine: Machine, settled: Collection[str]) -> Iterator[Config]:
    """Every possible layout, whether or not it fits into memory; `settled`: keys of SETTLED_BY that are not varied."""
    def choices(part: str, values: list[dict]) -> list[dict]:
        return [{}] if part in settled else values

    divisors = [size for size in range(1, machine.num_gpus + 1) if machine.num_gpus % size == 0]
    tensors = choices("tensor", [{"tensor_model_parallel_size": size} for size in divisors
                                 if size <= machine.gpus_per_node])
    pipelines = choices("pipeline", [{"pipeline_model_parallel_size": size} for size in divisors
                                     if size <= config.model.num_layers])
    shardings = choices("sharding", [{"data_parallel_sharding": "none"}, {"DDP_impl": "torch"}, *(
        {"data_parallel_sharding": what} for what in ("optimizer", "gradients", "parameters"))])
    recomputations = _recomputations(config) if "recompute" not in settled else []
    models = [replace(config.model, **recompute) for recompute in choices("recompute", recomputations)]
    trainings = [replace(config.training, **rows) for rows in choices(
        "rows", [{"micro_batch_size": 2**power} for power in range(_MOST_ROWS.bit_length())])]
    for tensor, pipeline in itertools.product(tensors, pipelines):
        grid = _with_parallel(config, **tensor, **pipeline)
        # Sequence parallelism saves memory and costs nothing.
        has_tensor = grid.parallel.tensor_model_parallel_size > 1
        sequence = {} if "sequence" in settled else {"sequence_parallel": has_tensor}
        schedules = choices("schedule", list(_schedules(grid)))
        for schedule, sharding in itertools.product(schedules, shardings):
            layout = _with_parallel(grid, **sequence, **schedule, **sharding)
            for training, model in itertools.product(trainings, models):
                candidate = replace(layout, training=training, model=model)
                if _works(candidate, machine.num_gpus, "sharding" in settled):
                    yield candidate


def _with_parallel(config: Config, **values: object) -> Config:
    return replace(config, parallel=replace(config.parallel, **values))  # type: ignore[arg-type]


def _schedules(config: Config) -> Iterator[dict]:
    """Pipeline schedules to try: 1F1B, zero-bubble, and interleaved with every possible number of blocks a stage."""
    yield {"pipeline_schedule": "1f1b"}
    size = config.parallel.pipeline_model_parallel_size
    if size > 1:
        yield {"pipeline_schedule": "zero-bubble"}
        blocks = config.model.num_layers // size
        yield from ({"num_layers_per_virtual_pipeline_stage": count} for count in range(1, blocks)
                    if config.model.num_layers % (size * count) == 0)


def _recomputations(config: Config) -> list[dict]:
    """Recomputation to try: none, full, and selective if that saves memory, since fused attention keeps little anyway.
    """
    none, selective, full = ({"checkpoint_activations": False, "recompute_granularity": None},
                             {"checkpoint_activations": False, "recompute_granularity": "selective"},
                             {"checkpoint_activations": True, "recompute_granularity": None})
    alone = replace(config, parallel=ParallelConfig(), training=replace(config.training, micro_batch_size=1))
    ranks = [Rank(replace(alone, model=replace(config.model, **what)), 1) for what in (none, selective)]
    kept, kept_selective = (sum(piece.kept for piece in rank.stages[0].pieces if piece.num_blocks) for rank in ranks)
    return [none, *([selective] if kept_selective < _WORTHWHILE * kept else []), full]


def _works(config: Config, num_gpus: int, is_sharding_settled: bool) -> bool:
    """Whether a layout is possible, and not the same as another one."""
    try:
        check_layout(config, num_gpus)
    except ConfigError:
        return False
    data_size = grid_sizes(config.parallel, num_gpus)["data"]
    parallel = config.parallel
    replicas = data_size * parallel.context_parallel_size
    shares_out = parallel.data_parallel_sharding != "none" or parallel.DDP_impl == "torch"
    if replicas == 1 and shares_out and not is_sharding_settled:
        return False  # nothing to shard: the same layout again
    rows = config.training.micro_batch_size * data_size
    return (config.training.global_batch_size or rows) % rows == 0


def _extreme_ranks(config: Config, num_gpus: int) -> list[Rank]:
    """The ranks that may need most memory or time: one at each end of the pipeline, and one beside each end."""
    size = config.parallel.pipeline_model_parallel_size
    return [Rank(config, num_gpus, place * (num_gpus // size)) for place in sorted({0, min(1, size - 1),
                                                                                    max(0, size - 2), size - 1})]


def layout_flags(config: Config) -> list[str]:
    """The command-line flags of the layout of `config`, to append to those of the model."""
    items = {item.name: item for _, section in config.sections() for item in fields(section)}
    values = config.as_dict()
    names = [name for name in _LAYOUT if values[name] != items[name].default]
    is_selective = config.model.recompute_granularity == "selective"
    names.append("recompute_granularity" if is_selective else "checkpoint_activations")
    return [as_given(items[name], in_words(items[name], values[name])) for name in names]
