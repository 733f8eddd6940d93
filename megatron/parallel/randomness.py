"""Random numbers that depend on what they are for, never on what was drawn before.

A parameter's initial values derive from the seed and its name, a micro-batch's dropout from the seed and its first
sample. So a resumed run needs no saved generator state, and any layout starts from the same weights.

The default generators stand alike on all ranks of a tensor axis: dropout of what these hold in common is the same.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron.parallel.mesh import Axis


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_for(1234, "dropout", sample)`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_dropout(seed: int, first_sample: int, stage: int, context_rank: int) -> None:
    """Seed the default generators of all devices for one stage of the micro-batch that begins with `first_sample`.

    Other numbers on each context rank, which has other tokens of it.
    """
    torch.manual_seed(seed_for(seed, "dropout", first_sample, stage, context_rank))


def rate_of(module: nn.Module) -> float:
    """The rate of a module's `dropout` as it is now: 0 outside training.

    Where it is always 0, the module's mode is not looked at, so that a graph compiled for training serves evaluation.
    """
    return module.dropout if module.dropout and module.training else 0.0  # type: ignore[return-value]


@contextmanager
def distinct_randomness(axis: Axis, rate: float, device: torch.device) -> Iterator[None]:
    """The context of dropout of `rate` on what is split over `axis`: other numbers on each rank.

    The seed within comes from the default CPU generator, which is in step on all ranks of the axis. So it is another at
    each place, and the same when `torch.utils.checkpoint`, which restores the default generators, computes it again.
    Afterwards the default generators are in step again. On one rank, and for a rate of 0, this does nothing.
    """
    if axis.size == 1 or rate == 0:
        yield
        return
    seed = seed_for(int(torch.randint(2**62, ())), axis.rank)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
