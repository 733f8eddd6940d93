"""Where this process stands in the grid of ranks, and how it joins the others.

Environment variables are read here and nowhere else. A process that no launcher started is a grid of one rank,
without a process group: collectives on a one-rank axis do nothing.
"""

import os
from collections.abc import Iterator, Mapping
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
    """This process among all ranks, along each axis of their grid, and its device.

    `data`: ranks that see different rows. `tensor`: ranks that share each layer and see the same rows.
    """

    world: Axis
    data: Axis
    tensor: Axis
    device: torch.device


def launched_rank() -> int:
    """This process's number among those that the launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(config: ParallelConfig) -> Iterator[Mesh]:
    """The mesh, for as long as this process is a member of it; leaves the group at the end.

    The tensor-parallel size divides the number of ranks (`megatron.parallel.layout` sees to it).
    """
    rank, size = launched_rank(), launched_size()
    device = _device(config)
    if size == 1:
        yield Mesh(world=Axis(), data=Axis(), tensor=Axis(), device=device)
        return
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("--distributed-backend nccl needs a GPU on every rank; give gloo")
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=size, timeout=timeout)
    try:
        # From the slowest to the fastest: tensor ranks talk most, so they are neighbours, on one host where they fit.
        tensor_size = config.tensor_model_parallel_size
        axes = build_axes({"data": size // tensor_size, "tensor": tensor_size}, timeout)
        yield Mesh(world=Axis(rank, size, dist.group.WORLD), data=axes["data"], tensor=axes["tensor"], device=device)
    finally:
        dist.destroy_process_group()


def build_axes(sizes: Mapping[str, int], timeout: timedelta) -> dict[str, Axis]:
    """This rank's axes, by name, in the grid of all ranks whose `sizes` go from the slowest axis to the fastest.

    Every rank calls this with the same sizes. Waiting in any of the groups ends after `timeout`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    axes = {}
    for name, size in sizes.items():
        lines = lines_along(sizes, name)
        if size in (1, world):
            group = dist.group.WORLD if size == world else None
        else:
            group, _ = dist.new_subgroups_by_enumeration(lines, timeout=timeout, group_desc=name)
        mine = next(line for line in lines if rank in line)
        axes[name] = Axis(mine.index(rank), size, group)
    return axes


def lines_along(sizes: Mapping[str, int], name: str) -> list[list[int]]:
    """The ranks of each group along axis `name` of a grid that is numbered row by row."""
    grid = torch.arange(torch.Size(sizes.values()).numel()).view(*sizes.values())
    return grid.movedim(list(sizes).index(name), -1).reshape(-1, sizes[name]).tolist()


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
