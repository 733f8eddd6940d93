"""Proteins to rows of whole proteins for a model that is asked, not trained, and as many in each as memory allows.

There is no padding and no filler: a row has as many tokens as its proteins. Shapes: t tokens.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.kernels.packed_sequence import PackedSequence
from megatron.parallel.collectives import everyones
from megatron.parallel.mesh import Mesh

MOST_TOKENS = {"cpu": 4096, "cuda": 65_536}  # more in one row makes nothing faster
_SHARE = 4  # of the memory that is free a row takes one such part

T = TypeVar("T")


def token_budget(asked: int | None, config: ModelConfig, num_layers: int, mesh: Mesh) -> int:
    """How many tokens a row may have: as asked, else so that what a forward pass keeps of `num_layers` layers fits.

    Into the memory of each tensor rank, that is: they call this together and get the same.
    """
    if asked:
        return asked
    # What a block has at once: the stream and its norm, queries, keys and values, the context, the feed-forward twice.
    width = 8 * config.hidden_size + 2 * config.ffn_hidden_size * (1 + config.swiglu)
    bytes_a_token = 4 * (width + 2 * num_layers * config.hidden_size)
    most = max(1, min(MOST_TOKENS[mesh.device.type], free_bytes(mesh.device) // (_SHARE * bytes_a_token)))
    return min(everyones(most, mesh.tensor))


def shared_out(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The places of the proteins of each row, the longest proteins first; longer ones than `budget` by themselves.

    Proteins of a row are about equally long, so that the processors that share it out have equal work.
    """
    return grouped(sorted(range(len(lengths)), key=lambda place: -lengths[place]), lengths.__getitem__, budget)


def grouped(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """As many items at a time, in their order, as have no more than `most` together; a larger one by itself."""
    group, total = list[T](), 0
    for item in items:
        size = size_of(item)
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def packed(proteins: Sequence[np.ndarray], device: torch.device) -> PackedSequence:
    """One row of proteins, each its ids between its ends."""
    lengths = [len(ids) for ids in proteins]
    positions_t = np.concatenate([np.arange(length) for length in lengths])
    tokens_t, ends = np.concatenate(proteins).astype(np.int64), [0, *accumulate(lengths)]
    row = PackedSequence(torch.from_numpy(tokens_t), torch.from_numpy(positions_t),
                         torch.tensor(ends, dtype=torch.int32), max(lengths), num_filler=0)
    return row.map(lambda tensor: tensor.to(device))


def split(values_t: Tensor, row: PackedSequence) -> list[Tensor]:
    """The part of each of a row's proteins, along the first dimension."""
    return list(values_t.split(torch.diff(row.cu_seqlens).tolist()))


def free_bytes(device: torch.device) -> int:
    """How much memory may still be taken; on the host what its caches hold counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
