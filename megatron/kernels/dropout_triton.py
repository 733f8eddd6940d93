"""The random numbers of `megatron.kernels.dropout` for Triton kernels: 16 bits each, eight from each Philox counter.

A counter is (row, column // 8, head, use); `seed` points to the key.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def drawn(seed, row, start, head, use, COLUMNS: tl.constexpr):
    """The numbers [rows, COLUMNS] for the columns from `start` on, which is a multiple of eight."""
    eight = start // 8 + tl.arange(0, COLUMNS // 8)
    numbers = _halves(seed, row[:, None], eight[None, :], head, use)
    return tl.reshape(numbers, [row.shape[0], COLUMNS])


@triton.jit
def drawn_by_column(seed, row, start, head, use, COLUMNS: tl.constexpr):
    """The numbers of `drawn`, transposed: [COLUMNS, rows]."""
    eight = start // 8 + tl.arange(0, COLUMNS // 8)
    numbers = tl.permute(_halves(seed, row[None, :], eight[:, None], head, use), (0, 2, 3, 4, 1))
    return tl.reshape(numbers, [COLUMNS, row.shape[0]])


@triton.jit
def _halves(seed, row, eight, head, use):
    """The numbers of each counter, [..., 2, 2, 2]: high and low bit of the word's number, then low or high half."""
    a, b, c, d = tl.philox(tl.load(seed), row, eight, head, use, ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
