"""Where this process stands in the grid of ranks, and how it joins the others.

The grid's axes, from the slowest to the fastest: pipeline, data, context, tensor. Tensor ranks talk most, so they are
neighbours, on one host where they fit. A process that no launcher started is a grid of one rank, without a process
group: collectives on a one-rank axis do nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.errors import ConfigError, LaunchError
from megatron.parallel.launch.environment import Launch
from megatron.parallel.launch.hosts import choose_interface
from megatron.parallel.launch.meeting import meeting_store
from megatron.parallel.launch.watch import RankProgress, watched
from megatron.parallel.waits import Waits


@dataclass(frozen=True)
class Axis:
    """One direction of the grid: this rank's place among `size` ranks, and their group (None for one rank).

    `waits` counts how long this rank waits for the others of it.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    waits: Waits | None = field(default=None, compare=False, repr=False)


ONE_RANK_AXIS = Axis()


@dataclass(frozen=True)
class Mesh:
    """This process among all ranks, along each axis of their grid, and its device.

    `pipeline`: ranks that share the depth. `data`: ranks that see different rows. `context`: ranks that share the
    tokens of each row. `tensor`: ranks that share each layer. `replicas`: data and context together, the ranks that
    have the same parameters and see other tokens; of these, `shards` are the neighbours that share out what
    `--data-parallel-sharding` says, and `copies` those that have the same share. `holders`: replicas and tensor
    together, all ranks that have parts of the same parameters, numbered by copy, shard and tensor rank. `ends`: the
    first and the last pipeline rank, on these; one rank elsewhere. `channels`: groups of the pipeline for
    point-to-point messages, each of which carries one kind of message in one direction, so that no two ever wait for
    each other. `writers`: all ranks on a gloo group of their own, on which they agree about files while the others are
    at work for the training. `progress`: what this rank tells the others of when they have to wait. `waits`: for how
    long it has waited itself, counted where there are several ranks.
    """

    world: Axis = field(default_factory=Axis)
    pipeline: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    context: Axis = field(default_factory=Axis)
    tensor: Axis = field(default_factory=Axis)
    replicas: Axis = field(default_factory=Axis)
    shards: Axis = field(default_factory=Axis)
    copies: Axis = field(default_factory=Axis)
    holders: Axis = field(default_factory=Axis)
    ends: Axis = field(default_factory=Axis)
    channels: tuple[dist.ProcessGroup, ...] = ()
    writers: Axis = field(default_factory=Axis)
    device: torch.device = torch.device("cpu")
    progress: RankProgress = field(default_factory=RankProgress)
    waits: Waits | None = None

    @property
    def is_first_reader(self) -> bool:
        """Whether this is the first of the ranks that read the same rows: what all of them know counts here."""
        return self.pipeline.rank == self.context.rank == self.tensor.rank == 0

@contextmanager
def joined(config: ParallelConfig, launch: Launch) -> Iterator[Mesh]:
    """The mesh, for as long as this process is a member of it; leaves the group at the end.

    The layout fits the number of ranks (`megatron.parallel.layout` sees to it).
    """
    device = device_of(launch, config.local_rank)
    if launch.size == 1:
        yield Mesh(device=device)
        return
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("--distributed-backend nccl needs a GPU on every rank; give gloo")
    choose_interface(launch.is_on_one_host)  # beside NCCL's there is a group of gloo's, of those who write
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    store = meeting_store(launch, timeout)
    # Before the ranks have met: a clone connects anew, and waits for the timeout where rank 0 has gone already.
    of_watch = store.clone()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
    mesh = with_writers(with_waits(build_mesh(config, device, timeout)), timeout)
    with watched(of_watch, launch.rank, launch.size, timeout, mesh.progress):
        yield mesh
    # Not after an error: the process is about to end, and its peers should not hear of it before it has said why.
    dist.destroy_process_group()


def device_of(launch: Launch, local_rank: int | None = None) -> torch.device:
    """This rank's GPU, made the current one; the CPU where there are none. Raises LaunchError where that is not clear.

    `local_rank`: the flag of old launchers, for a launch that has none.
    """
    num_gpus = torch.cuda.device_count()
    if not torch.cuda.is_available():
        if num_gpus:  # of which the driver tells, and which other hosts of the job may take
            raise LaunchError(f"this host shows {num_gpus} GPUs that PyTorch {torch.__version__} cannot use (python "
                              "tools/doctor.py says why); to train on CPUs, hide them: CUDA_VISIBLE_DEVICES=''")
        return torch.device("cpu")
    index = launch.local_rank if launch.local_rank is not None else local_rank
    if index is None and launch.size == 1:
        index = 0
    # srun --gpus-per-task, or a wrapper around each rank, lets a rank see one GPU only: its own, as number 0.
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
    """This rank's mesh in the process group that it is a member of; all ranks call this together."""
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
    return Mesh(world=Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), **axes, replicas=replicas,
                shards=build_axis(split, ["shards"], timeout), copies=build_axis(split, ["copies"], timeout),
                holders=holders, ends=ends, channels=channels, device=device, progress=RankProgress())


def with_waits(mesh: Mesh) -> Mesh:
    """The mesh, whose axes' collectives count how long this rank waits in them."""
    waits = Waits(mesh.device)
    axes: dict[str, Any] = {item.name: replace(axis, waits=waits) for item in fields(mesh)
                            if isinstance(axis := getattr(mesh, item.name), Axis)}
    return replace(mesh, **axes, waits=waits)


def with_writers(mesh: Mesh, timeout: timedelta) -> Mesh:
    """The mesh of ranks that save, whatever they compute on; all ranks call this together."""
    group = dist.new_group(backend="gloo", timeout=timeout, group_desc="writers")
    return replace(mesh, writers=replace(mesh.world, group=group, waits=None))


def grid_sizes(config: ParallelConfig, num_ranks: int) -> dict[str, int]:
    """The grid's size along each axis, from the slowest to the fastest; what the others leave is data parallel."""
    pipeline, context, tensor = (config.pipeline_model_parallel_size, config.context_parallel_size,
                                 config.tensor_model_parallel_size)
    return {"pipeline": pipeline, "data": num_ranks // (pipeline * context * tensor), "context": context,
            "tensor": tensor}


def build_axis(sizes: Mapping[str, int], names: Sequence[str], timeout: timedelta) -> Axis:
    """This rank's axis along one or several neighbouring `names` of a grid, whose `sizes` go from slowest to fastest.

    Every rank calls this with the same sizes. Waiting in the group ends after `timeout`.
    """
    return _axis(line_through(sizes, names, dist.get_rank()), timeout, "+".join(names))


def line_through(sizes: Mapping[str, int], names: Sequence[str], rank: int) -> list[int]:
    """The ranks of the group along `names` that `rank` belongs to, in a grid that is numbered row by row."""
    grid = torch.arange(torch.Size(sizes.values()).numel()).view(*sizes.values())
    place = [int(index) for index in (grid == rank).nonzero()[0]]
    where = tuple(slice(None) if name in names else place[number] for number, name in enumerate(sizes))
    return grid[where].flatten().tolist()


def _axis(line: list[int], timeout: timedelta, name: str) -> Axis:
    world = dist.get_world_size()
    if len(line) == 1:
        return Axis()
    group = dist.group.WORLD if len(line) == world else _new_group(line, timeout, name)
    return Axis(line.index(dist.get_rank()), len(line), group)


def _ends(line: list[int], timeout: timedelta) -> Axis:
    if len(line) == 1 or dist.get_rank() in (line[0], line[-1]):
        return _axis(sorted({line[0], line[-1]}), timeout, "ends")
    # torch names a group by how many its ranks have made before: so those between the ends make one as well.
    _new_group(line[1:-1], timeout, "between the ends")
    return Axis()


def _new_group(line: list[int], timeout: timedelta, name: str) -> dist.ProcessGroup:
    # Only its members make a group; all ranks make their groups in the same order of axes.
    return dist.new_group(line, timeout=timeout, use_local_synchronization=True, group_desc=name)
