"""Assigns the model's blocks to pipeline stages; a stage is a run of consecutive blocks.

With P pipeline ranks and V stages on each, stage s is on rank s mod P: a micro-batch passes all ranks V times
(Narayanan et al., 2021, arXiv 2104.04473).
"""

from dataclasses import dataclass

from megatron.config import ParallelConfig


@dataclass(frozen=True)
class Stage:
    """One stage of the model: `number` (from 0) of `num_stages`, with the blocks numbered `layers`."""

    number: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head and the loss."""
        return self.number == self.num_stages - 1


def whole_model(num_layers: int) -> Stage:
    """The single stage of a model that is not split."""
    return Stage(0, 1, range(num_layers))


def stages_of_rank(num_layers: int, config: ParallelConfig, rank: int) -> list[Stage]:
    """The stages of pipeline rank `rank`, in the order in which a micro-batch passes them."""
    counts = layers_a_stage(num_layers, config)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return [Stage(number, len(counts), range(starts[number], starts[number] + counts[number]))
            for number in range(rank, len(counts), config.pipeline_model_parallel_size)]


def num_virtual_stages(num_layers: int, config: ParallelConfig) -> int:
    """The number of stages on each pipeline rank."""
    blocks = config.num_layers_per_virtual_pipeline_stage
    return num_layers // (config.pipeline_model_parallel_size * blocks) if blocks else 1


def layers_a_stage(num_layers: int, config: ParallelConfig) -> list[int]:
    """The number of blocks of each stage: even, apart from `--decoder-first/last-pipeline-num-layers`.

    Embedding and head cost only a fraction of a block (a lookup; a few products for the masked tokens), so that blocks
    left over go to stages that have neither, then to the last stage, whose rank keeps the fewest activations.
    """
    num_stages = config.pipeline_model_parallel_size * num_virtual_stages(num_layers, config)
    given = {0: config.decoder_first_pipeline_num_layers, num_stages - 1: config.decoder_last_pipeline_num_layers}
    fixed = {stage: count for stage, count in given.items() if count is not None}
    free = [stage for stage in range(num_stages) if stage not in fixed]
    base, over = divmod(num_layers - sum(fixed.values()), len(free)) if free else (0, 0)
    by_preference = sorted(free, key=lambda stage: (stage in (0, num_stages - 1), -stage))
    larger = set(by_preference[:over])
    return [fixed.get(stage, base + (stage in larger)) for stage in range(num_stages)]
