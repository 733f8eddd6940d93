"""Blocks compiled by torch.compile: each once, since all micro-batches have one shape, and all alike from one graph."""

from collections.abc import Iterable

import torch
from torch import nn

from megatron.config import Config, ParallelConfig

_MOST_GRAPHS = 64


def wants_compilation(config: Config, device: torch.device) -> bool:
    """Whether `--compile` says so, or where it says nothing, whether it should be faster: on GPUs.

    A schedule that puts weights' gradients off cannot be compiled (`megatron.parallel.layout` refuses the two), nor can
    attention that is recomputed by itself: inductor (2.13) fails on sizes that are born inside of what is recomputed.
    """
    if config.training.compile is not None:
        return config.training.compile
    return (device.type == "cuda" and config.parallel.pipeline_schedule != "zero-bubble"
            and config.model.recompute_granularity != "selective")


def compile_blocks(blocks: Iterable[nn.Module], config: ParallelConfig) -> None:
    """Let each block compile itself when it is first called.

    On one tensor and context rank a block is one graph; elsewhere its collectives stay outside and cut it into some.
    """
    # What attention keeps for the backward pass has a size of its own in each micro-batch.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # All blocks are one function to torch, which else gives up at 8 graphs: windows, skips, the first block's inputs,
    # training and evaluation, scales before a history, each doubles them.
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    is_whole = config.tensor_model_parallel_size == config.context_parallel_size == 1
    for block in blocks:
        block.compile(fullgraph=is_whole, dynamic=False)
