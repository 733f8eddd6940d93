"""Philox-4x32 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") in NumPy, the oracle of dropout."""

from collections.abc import Sequence

import numpy as np


def philox(counters: np.ndarray, seed: int, rounds: int) -> np.ndarray:
    """Four random words, uint64 [..., 4] below 2^32, for each counter of four words [..., 4]; `seed`: a 64-bit key."""
    high, mask = np.uint64(32), np.uint64(2**32 - 1)
    words = [counters[..., i].astype(np.uint64) for i in range(4)]
    keys = [seed % 2**32, seed >> 32]
    for _ in range(rounds):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [(second >> high) ^ words[1] ^ np.uint64(keys[0]), second & mask,
                 (first >> high) ^ words[3] ^ np.uint64(keys[1]), first & mask]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return np.stack(words, -1)


def kept(seed: int, rate: float, rows: Sequence[int], columns: Sequence[int], heads: Sequence[int],
         use: int) -> np.ndarray:
    """Whether dropout keeps each element (row, column) of each head, bool [heads, rows, columns].

    An element is kept if its 16 bits, half a word of the counter (row, column // 8, head, use), are below
    (1 - rate)·65536, rounded.
    """
    head, row, column = np.meshgrid(heads, rows, columns, indexing="ij")
    words = philox(np.stack([row, column // 8, head, np.full_like(head, use)], -1), seed, 7)
    word = np.take_along_axis(words, column[..., None] % 8 // 2, -1)[..., 0]
    number = np.where(column % 2, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return number < round((1 - rate) * 65536)
