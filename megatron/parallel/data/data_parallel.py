"""Data parallelism: gradients are summed over the ranks that see other tokens, on each of them or on a share of each.

Sums, not means: the loss is already divided by the number of targets in the *global* batch. Gradients are summed in
fp32; frozen parameters have none. Each way offers the same: the parameters that the optimizer steps, and what is due at
each backward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron.config import ParallelConfig
from megatron.parallel.data.replicated import DataParallel, Overlapped, materialise
from megatron.parallel.mesh import Mesh


def data_parallel(stages: Sequence[nn.Module], blocks: Callable[[Any], Iterable[nn.Module]], mesh: Mesh,
                  config: ParallelConfig, dtype: torch.dtype) -> DataParallel:
    """The way that `config` asks for; `blocks` names the parts of a stage that are shared out and gathered one by one.

    Stages that are built on `meta` get memory on the mesh's device, this rank's share of it, and no values yet. Where
    parameters are gathered, it is in `dtype`, that of the products. On one rank there is nothing to share out.
    """
    if config.data_parallel_sharding != "none" and mesh.shards.size > 1:
        from megatron.parallel.data.sharded import Sharded  # importing FSDP2 takes as long as importing torch

        return Sharded(stages, blocks, mesh, config.data_parallel_sharding, dtype)
    for stage in stages:
        materialise(stage, mesh.device)
    if config.DDP_impl == "torch" and mesh.replicas.size > 1:
        return Overlapped(stages, mesh)
    return DataParallel(stages, mesh)
