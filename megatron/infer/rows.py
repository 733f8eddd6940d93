"""Proteins to rows of whole proteins for a model that is asked, not trained, and as many in each as memory allows.

There is no padding and no filler: a row has as many tokens as its proteins. Shapes: t tokens.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.kernels.packed_sequence import PackedSequence

MOST_TOKENS = {"cpu": 4096, "cuda": 65_536}  # more in one row makes nothing faster
_SHARE = 4  # of the memory that is free a row takes one such part


def token_budget(config: ModelConfig, num_layers: int, device: torch.device) -> int:
    """How many tokens a row may have, so that what a forward pass keeps of `num_layers` layers fits into memory."""
    # What a block has at once: the stream and its norm, queries, keys and values, the context, the feed-forward twice.
    width = 8 * config.hidden_size + 2 * config.ffn_hidden_size * (1 + config.swiglu)
    bytes_a_token = 4 * (width + 2 * num_layers * config.hidden_size)
    return max(1, min(MOST_TOKENS[device.type], free_bytes(device) // (_SHARE * bytes_a_token)))


def shared_out(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The places of the proteins of each row, the longest proteins first; longer ones than `budget` by themselves.

    Proteins of a row are about equally long, so that the processors that share it out have equal work.
    """
    row, num_tokens = list[int](), 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if row and num_tokens + lengths[place] > budget:
            yield row
            row, num_tokens = [], 0
        row.append(place)
        num_tokens += lengths[place]
    if row:
        yield row


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
