"""torch.compile of the blocks. Each graph is compiled once, as all micro-batches have one shape, and shared by blocks.
"""

from collections.abc import Iterable

import torch
from torch import nn

from megatron.config import Config, ParallelConfig

_MOST_GRAPHS = 64


def wants_compilation(config: Config, device: torch.device) -> bool:
    """Whether to compile: as `--compile` says, and without that flag on GPUs, where it should be faster.

    The zero-bubble schedule, which defers weight gradients, cannot be compiled (`megatron.parallel.layout` refuses the
    two together), and neither can selective recomputation of attention: inductor (2.13) fails on sizes that first
    appear inside a recomputed part.
    """
    if config.training.compile is not None:
        return config.training.compile
    return (device.type == "cuda" and config.parallel.pipeline_schedule != "zero-bubble"
            and config.model.recompute_granularity != "selective")


def compile_blocks(blocks: Iterable[nn.Module], config: ParallelConfig) -> None:
    """Let each block compile itself when it is first called.

    On one tensor and context rank a block is one graph; otherwise its collectives split it into several.
    """
    # What attention saves for the backward pass has another size in each micro-batch.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # To torch all blocks are one function, of which it compiles 8 variants by default. Windows, skips, the first
    # block's inputs, evaluation, and FP8 scales before there is a history can each double their number.
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    is_whole = config.tensor_model_parallel_size == config.context_parallel_size == 1
    for block in blocks:
        block.compile(fullgraph=is_whole, dynamic=False)
