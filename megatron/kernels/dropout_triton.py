"""What `megatron.kernels.dropout` draws, inside of Triton's kernels: numbers of 16 bits, eight of each counter."""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def drawn(seed, row, start, head, use, COLUMNS: tl.constexpr):
    """[rows, COLUMNS]: the numbers of columns from `start`, a multiple of eight, on."""
    eight = start // 8 + tl.arange(0, COLUMNS // 8)
    numbers = _halves(seed, row[:, None], eight[None, :], head, use)
    return tl.reshape(numbers, [row.shape[0], COLUMNS])


@triton.jit
def drawn_by_column(seed, row, start, head, use, COLUMNS: tl.constexpr):
    """[COLUMNS, rows]: the same, transposed."""
    eight = start // 8 + tl.arange(0, COLUMNS // 8)
    numbers = tl.permute(_halves(seed, row[None, :], eight[:, None], head, use), (0, 2, 3, 4, 1))
    return tl.reshape(numbers, [COLUMNS, row.shape[0]])


@triton.jit
def _halves(seed, row, eight, head, use):
    """The counters' words, [..., 2, 2, 2]: of a word's number the higher and the lower bit, and which half."""
    a, b, c, d = tl.philox(tl.load(seed), row, eight, head, use, ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
