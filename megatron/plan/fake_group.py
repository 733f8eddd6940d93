"""A process group that sends nothing, to run one rank of a layout without the others."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron.parallel.mesh import ONE_RANK_AXIS, Axis, build_axis


@contextmanager
def fake_group(rank: int, num_ranks: int) -> Iterator[None]:
    """A context with a process group whose operations return at once and send nothing; for one rank there is none."""
    if num_ranks == 1:
        yield
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)
    from torch._C._distributed_c10d import FakeWork

    # Its operations are complete at once, but do not report it, and their tensors would be kept alive.
    FakeWork.is_completed = lambda self: True  # type: ignore[method-assign]
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_axes(rank: int, sizes: Mapping[str, int]) -> Iterator[dict[str, Axis]]:
    """A context with the axes, by name, of rank number `rank` in a grid of these `sizes`, whose groups are fake."""
    with fake_group(rank, math.prod(sizes.values())):
        yield {name: build_axis(sizes, [name], timedelta(minutes=1)) if size > 1 else ONE_RANK_AXIS
               for name, size in sizes.items()}
