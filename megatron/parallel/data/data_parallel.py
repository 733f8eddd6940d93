"""Chooses the kind of data parallelism: replicated parameters, torch's DDP, or FSDP2.

Gradients are summed, not averaged: the loss is already divided by the number of targets in the *global* batch. The sums
are in fp32; frozen parameters have none. All kinds share the interface of `DataParallel`.
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
    """The data parallelism that `config` asks for, around `stages`.

    `blocks`: the modules of a stage that are sharded and gathered one by one. `dtype`: the compute dtype, in which
    sharded parameters are gathered. Stages built on `meta` get memory on the mesh's device for this rank's shard,
    without values yet.
    """
    if config.data_parallel_sharding != "none" and mesh.shards.size > 1:
        from megatron.parallel.data.sharded import Sharded  # importing FSDP2 takes as long as importing torch

        return Sharded(stages, blocks, mesh, config.data_parallel_sharding, dtype)
    for stage in stages:
        materialise(stage, mesh.device)
    if config.DDP_impl == "torch" and mesh.replicas.size > 1:
        return Overlapped(stages, mesh)
    return DataParallel(stages, mesh)
