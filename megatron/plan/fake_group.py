"""A process group that sends nothing, to run one rank of a layout without the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


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
