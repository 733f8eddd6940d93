"""The mesh: this process's place in the grid of ranks, and the process groups along its axes.

The axes, from the slowest varying to the fastest: pipeline, data, context, tensor. Tensor ranks communicate most, so
they are neighbours, on one host if they fit. A process that no launcher started is a grid of one rank without a process
group: collectives on a one-rank axis do nothing.
"""

import faulthandler
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.errors import ConfigError, LaunchError
from megatron.parallel.launch.environment import Launch
from megatron.parallel.launch.failure import told_once
from megatron.parallel.launch.hosts import choose_interface
from megatron.parallel.launch.meeting import meeting_store
from megatron.parallel.launch.watch import RankProgress, watched
from megatron.parallel.waits import Waits


@dataclass(frozen=True)
class Axis:
    """A process group, and this rank's place in it: along one direction of the grid, or over several together."""

    rank: int = 0  # this process's number in the group
    size: int = 1
    group: dist.ProcessGroup | None = None  # None for one rank
    waits: Waits | None = field(default=None, compare=False, repr=False)  # counts how long this rank waits for others


ONE_RANK_AXIS = Axis()


@dataclass(frozen=True)
class Mesh:
    """This process's place on every axis of the grid, and its device.

    The comments say which ranks form the axis of rank 0 when 8 ranks have tensor size 2, pipeline size 2 and data
    size 2, with parameters sharded over both data-parallel ranks.
    """

    world: Axis = ONE_RANK_AXIS  # all ranks: 0 1 2 3 4 5 6 7
    pipeline: Axis = ONE_RANK_AXIS  # ranks with different stages of the model: 0 4
    data: Axis = ONE_RANK_AXIS  # ranks that read different rows: 0 2
    context: Axis = ONE_RANK_AXIS  # ranks with different tokens of the same rows: 0 alone
    tensor: Axis = ONE_RANK_AXIS  # ranks with different parts of the same layers: 0 1
    replicas: Axis = ONE_RANK_AXIS  # data x context, same parameters, different tokens: 0 2
    shards: Axis = ONE_RANK_AXIS  # those replicas over which --data-parallel-sharding shards: 0 2
    copies: Axis = ONE_RANK_AXIS  # those replicas that hold the same shard: 0 alone
    holders: Axis = ONE_RANK_AXIS  # replicas x tensor, all parts of the same parameters: 0 1 2 3
    ends: Axis = ONE_RANK_AXIS  # first and last pipeline rank; one rank on all ranks between: 0 4
    # Groups of the pipeline ranks for point-to-point messages. Each carries one kind of message in one direction, so
    # that no message waits for one of another kind.
    channels: tuple[dist.ProcessGroup, ...] = ()
    writers: Axis = ONE_RANK_AXIS  # all ranks on a gloo group, to agree on files beside the training
    device: torch.device = torch.device("cpu")
    progress: RankProgress = field(default_factory=RankProgress)  # the step, for the report if a rank hangs
    waits: Waits | None = None  # how long this rank has waited for others; None with one rank

    @property
    def is_first_reader(self) -> bool:
        """Whether this rank is the first of those that read the same rows, and so counts what all of them know."""
        return self.pipeline.rank == self.context.rank == self.tensor.rank == 0


@contextmanager
def open_mesh(config: ParallelConfig, launch: Launch, check: Callable[[Axis], None] | None = None) -> Iterator[Mesh]:
    """A context with the mesh: joins the process group, and destroys it at the end.

    The layout fits the number of ranks (`megatron.parallel.layout` checks that). `check`: called with the axis of all
    ranks once they have met, before any grid is made of them: that all want the same grid, for example.
    """
    if not launch.is_heard:  # else the launcher names the signal, and what it means
        faulthandler.enable(2, all_threads=False)
    device = device_of(launch, config.local_rank)
    if launch.size == 1:
        yield Mesh(device=device)
        return
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("--distributed-backend nccl needs a GPU on every rank; give gloo")
    choose_interface(launch.is_on_one_host)  # with NCCL too: `writers` is a gloo group
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    store = meeting_store(launch, timeout)
    # Cloned before the ranks meet: a clone opens a connection, and would wait for the timeout if rank 0 has gone.
    of_watch = store.clone()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
    with told_once(store, launch):
        if check is not None:
            check(_world())
        mesh = with_writers(with_waits(build_mesh(config, device, timeout)), timeout)
        with watched(of_watch, launch.rank, launch.size, timeout, mesh.progress):
            yield mesh
    # Not after an error: the process ends anyway, and its peers should not notice before it has said why.
    dist.destroy_process_group()


def device_of(launch: Launch, local_rank: int | None = None) -> torch.device:
    """This rank's GPU, made the current device; the CPU if there is no GPU. Raises LaunchError if it is not clear.

    `local_rank`: the flag that old launchers pass, used if the environment gives no local rank.
    """
    num_gpus = torch.cuda.device_count()
    if not torch.cuda.is_available():
        if num_gpus:  # the driver sees them, so other hosts of the job may be using theirs
            raise LaunchError(f"this host shows {num_gpus} GPUs that PyTorch {torch.__version__} cannot use (python "
                              "tools/doctor.py says why); to train on CPUs, hide them: CUDA_VISIBLE_DEVICES=''")
        return torch.device("cpu")
    index = launch.local_rank if launch.local_rank is not None else local_rank
    if index is None and launch.size == 1:
        index = 0
    # With srun --gpus-per-task, or a wrapper around each rank, a rank sees its own GPU only, as number 0.
    if index is not None and num_gpus == 1 and launch.launcher not in ("torchrun", "none"):
        index = 0
    if index is None:
        raise LaunchError(f"{launch.launcher} does not tell the ranks of a host apart; give each its LOCAL_RANK")
    if index >= num_gpus:
        raise LaunchError(f"local rank {index} has no GPU: this host shows {num_gpus}; start as many ranks a host as "
                          "it has GPUs")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def build_mesh(config: ParallelConfig, device: torch.device, timeout: timedelta) -> Mesh:
    """This rank's mesh in the initialised process group; a collective: all ranks call this together."""
    sizes = grid_sizes(config, dist.get_world_size())
    axes: dict[str, Any] = {name: build_axis(sizes, [name], timeout) for name in sizes}
    replicas = build_axis(sizes, ["data", "context"], timeout)
    inside = (config.shard_within or replicas.size) if config.data_parallel_sharding != "none" else 1
    split = {"pipeline": sizes["pipeline"], "copies": replicas.size // inside, "shards": inside,
             "tensor": sizes["tensor"]}
    holders = replicas if sizes["tensor"] == 1 else axes["tensor"] if replicas.size == 1 else (
        build_axis(split, ["copies", "shards", "tensor"], timeout))
    line = line_through(sizes, ["pipeline"], dist.get_rank())
    ends = _ends(line, timeout)
    num_channels = 0 if len(line) == 1 else 4 if config.num_layers_per_virtual_pipeline_stage else 2
    channels = tuple(_new_group(line, timeout, f"channel {number}") for number in range(num_channels))
    return Mesh(world=_world(), **axes, replicas=replicas,
                shards=build_axis(split, ["shards"], timeout), copies=build_axis(split, ["copies"], timeout),
                holders=holders, ends=ends, channels=channels, device=device, progress=RankProgress())


def with_waits(mesh: Mesh) -> Mesh:
    """The mesh with a `Waits` on every axis, so that collectives count how long this rank waits in them."""
    waits = Waits(mesh.device)
    axes: dict[str, Any] = {item.name: replace(axis, waits=waits) for item in fields(mesh)
                            if isinstance(axis := getattr(mesh, item.name), Axis)}
    return replace(mesh, **axes, waits=waits)


def with_writers(mesh: Mesh, timeout: timedelta) -> Mesh:
    """The mesh with its `writers`: all ranks on a gloo group, whatever the device. A collective."""
    group = dist.new_group(backend="gloo", timeout=timeout, group_desc="writers")
    return replace(mesh, writers=replace(mesh.world, group=group, waits=None))


def grid_sizes(config: ParallelConfig, num_ranks: int) -> dict[str, int]:
    """The grid's size along each axis, slowest varying first; the data axis takes what the other axes leave."""
    pipeline, context, tensor = (config.pipeline_model_parallel_size, config.context_parallel_size,
                                 config.tensor_model_parallel_size)
    return {"pipeline": pipeline, "data": num_ranks // (pipeline * context * tensor), "context": context,
            "tensor": tensor}


def build_axis(sizes: Mapping[str, int], names: Sequence[str], timeout: timedelta) -> Axis:
    """This rank's axis along one or several `names` of a grid with these `sizes`, slowest varying first.

    A collective: every rank calls this with the same arguments. `timeout`: of the process group's collectives.
    """
    return _axis(line_through(sizes, names, dist.get_rank()), timeout, "+".join(names))


def line_through(sizes: Mapping[str, int], names: Sequence[str], rank: int) -> list[int]:
    """The ranks that share `rank`'s place on all axes but `names`, in a grid numbered in row-major order."""
    grid = torch.arange(torch.Size(sizes.values()).numel()).view(*sizes.values())
    place = [int(index) for index in (grid == rank).nonzero()[0]]
    where = tuple(slice(None) if name in names else place[number] for number, name in enumerate(sizes))
    return grid[where].flatten().tolist()


def _world() -> Axis:
    return Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def _axis(line: list[int], timeout: timedelta, name: str) -> Axis:
    world = dist.get_world_size()
    if len(line) == 1:
        return ONE_RANK_AXIS
    group = dist.group.WORLD if len(line) == world else _new_group(line, timeout, name)
    return Axis(line.index(dist.get_rank()), len(line), group)


def _ends(line: list[int], timeout: timedelta) -> Axis:
    if len(line) == 1 or dist.get_rank() in (line[0], line[-1]):
        return _axis(sorted({line[0], line[-1]}), timeout, "ends")
    # torch derives a group's name from how many groups a rank has made: so the ranks between make one as well.
    _new_group(line[1:-1], timeout, "between the ends")
    return ONE_RANK_AXIS


def _new_group(line: list[int], timeout: timedelta, name: str) -> dist.ProcessGroup:
    # Only its members create a group; all ranks create theirs in the same order of axes.
    return dist.new_group(line, timeout=timeout, use_local_synchronization=True, group_desc=name)
