"""Packs whole proteins into rows for inference, as many in each row as memory allows.

There is no padding and no filler: a row has exactly the tokens of its proteins. Shapes: t tokens.
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
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Mesh

MOST_TOKENS = {"cpu": 4096, "cuda": 65_536}  # more in one row makes nothing faster
_SHARE = 4  # of the memory that is free a row takes one such part

T = TypeVar("T")


def token_budget(asked: int | None, config: ModelConfig, num_layers: int, mesh: Mesh) -> int:
    """The most tokens in a row: `asked` if given, else as many as fit into free memory in a forward pass that keeps the
    states of `num_layers` layers.

    The smallest free memory of the tensor ranks counts; all must call this together, and each gets the same result.
    """
    if asked:
        return asked
    # What a block has at once: the stream and its norm, queries, keys and values, the context, the feed-forward twice.
    width = 8 * config.hidden_size + 2 * config.ffn_hidden_size * (1 + config.swiglu)
    bytes_a_token = 4 * (width + 2 * num_layers * config.hidden_size)
    most = max(1, min(MOST_TOKENS[mesh.device.type], free_bytes(mesh.device) // (_SHARE * bytes_a_token)))
    return min(all_gather_object(most, mesh.tensor))


def shared_out(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The indices of the proteins in each row, longest first; a protein longer than `budget` has its own row.

    Proteins of similar length share a row, which gives the threads that process it equal work.
    """
    return grouped(sorted(range(len(lengths)), key=lambda place: -lengths[place]), lengths.__getitem__, budget)


def grouped(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Consecutive items in groups whose sizes sum to at most `most`; a larger item is its own group."""
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
    """One row of proteins, each given as ids with the tokens at its ends."""
    lengths = [len(ids) for ids in proteins]
    positions_t = np.concatenate([np.arange(length) for length in lengths])
    tokens_t, ends = np.concatenate(proteins).astype(np.int64), [0, *accumulate(lengths)]
    row = PackedSequence(torch.from_numpy(tokens_t), torch.from_numpy(positions_t),
                         torch.tensor(ends, dtype=torch.int32), max(lengths), num_filler=0)
    return row.map(lambda tensor: tensor.to(device))


def split(values_t: Tensor, row: PackedSequence) -> list[Tensor]:
    """The values of each protein of a row; splits the first dimension."""
    return list(values_t.split(torch.diff(row.cu_seqlens).tolist()))


def free_bytes(device: torch.device) -> int:
    """How much memory is available; on a host, memory used by caches counts as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
