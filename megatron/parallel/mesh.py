"""Where this process stands in the grid of ranks, and how it joins the others.

Environment variables are read here and nowhere else. A process that no launcher started is a grid of one rank,
without a process group: collectives on a one-rank axis do nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class Axis:
    """One direction of the grid: this rank's place among `size` ranks, and their group (None for one rank)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This process's rank among all, its axes and its device."""

    rank: int
    size: int
    data: Axis
    device: torch.device


def launched_rank() -> int:
    """This process's number among those that the launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined(config: ParallelConfig) -> Iterator[Mesh]:
    """The mesh, for as long as this process is a member of it; leaves the group at the end."""
    rank, size = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(config)
    if size == 1:
        yield Mesh(rank=0, size=1, data=Axis(), device=device)
        return
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("--distributed-backend nccl needs a GPU on every rank; give gloo")
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=size,
                            timeout=timedelta(minutes=config.distributed_timeout_minutes))
    try:
        yield Mesh(rank=rank, size=size, data=Axis(rank, size, dist.group.WORLD), device=device)
    finally:
        dist.destroy_process_group()


def _device(config: ParallelConfig) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", config.local_rank or 0))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; start as "
                          "many ranks a host as it has GPUs")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
