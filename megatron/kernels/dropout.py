"""Which numbers dropout keeps: by a generator that counts, so that nothing is stored and every layout drops the same.

Philox-4x32 with seven rounds, the fewest that pass every test of Salmon et al. (2011, "Parallel random numbers: as easy
as 1, 2, 3", doi 10.1145/2063384.2063405). The key is the seed of the transformer block, the counter (row, column // 8,
head, use). The four words that come out hold eight numbers of 16 bits, the lower half of a word first: number
`column % 8` is that of (row, column). A row is a token, by its place in the whole micro-batch; a column is a feature,
or of attention's weights a key's place. Kernels draw the same numbers; here they are drawn with plain PyTorch. Shapes:
u rows, x columns, n heads.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

_WORD = 2**32 - 1
_DRAWN = 2**16  # the rate comes in so many steps


class Use(IntEnum):
    """What dropout is applied to: each use draws other numbers from the same seed."""

    PROBABILITIES = 0  # of attention
    ATTENTION_OUTPUT = 1
    FEED_FORWARD_OUTPUT = 2
    EMBEDDINGS = 3
    ADAPTED_QUERY = 4  # what adapters of a layer take
    ADAPTED_KEY = 5
    ADAPTED_VALUE = 6
    ADAPTED_DENSE = 7
    ADAPTED_GATE = 8
    ADAPTED_DENSE_H_TO_4H = 9
    ADAPTED_DENSE_4H_TO_H = 10
    TASK_HEAD = 11


@dataclass(frozen=True)
class Dropout:
    """Dropout at a rate above 0 of rows and heads that are a part of the micro-batch's.

    `first_row`, `first_head`: the numbers in the micro-batch of the first ones here.
    """

    rate: float
    seed: Tensor  # int64, on the device
    use: Use
    first_row: int = 0
    first_head: int = 0

    @property
    def kept(self) -> int:
        """An element is kept where its random number, of 65,536, is below this."""
        return round((1 - self.rate) * _DRAWN)

    @property
    def growth(self) -> float:
        """The factor by which kept elements are multiplied, 1 / (1 - rate)."""
        return _DRAWN / self.kept if self.kept else 0.0

    def from_row(self, first_row: int) -> "Dropout":
        """The same dropout for rows that begin with number `first_row`."""
        return replace(self, first_row=first_row)


def dropped(x_ux: Tensor, dropout: Dropout | None, first_column: int = 0) -> Tensor:
    """`x_ux` [u, x] after dropout, unchanged if that is None; its columns are those from `first_column` on.

    Autograd keeps a byte an element.
    """
    if dropout is None:
        return x_ux
    keeps_ux = is_kept(dropout, len(x_ux), range(first_column, first_column + x_ux.shape[1]))[0]
    return torch.where(keeps_ux, x_ux * dropout.growth, 0)


def is_kept(dropout: Dropout, num_rows: int, columns: range, num_heads: int = 1) -> Tensor:
    """Which elements of so many heads, rows and these columns dropout keeps, bool [n, u, x]."""
    def counted(first: int, stop: int) -> Tensor:
        return torch.arange(first, stop, device=dropout.seed.device)

    row_u = counted(dropout.first_row, dropout.first_row + num_rows)
    eight_x = counted(columns.start // 8, -(-columns.stop // 8))
    head_n = counted(dropout.first_head, dropout.first_head + num_heads)
    words = _philox((row_u[:, None], eight_x, head_n[:, None, None], torch.full_like(eight_x, dropout.use)),
                    dropout.seed)
    numbers_nux = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten(-2)
    first = columns.start % 8
    return numbers_nux[..., first:first + len(columns)] < dropout.kept


def _philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """The four words, each an int64 below 2^32, of a counter of such words."""
    first, second, third, fourth = counter
    low_key, high_key = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(7):
        product, other = first * 0xD2511F53, third * 0xCD9E8D57  # their 64 bits, the highest of which is the sign
        first, second, third, fourth = (((other >> 32) & _WORD) ^ second ^ low_key, other & _WORD,
                                        ((product >> 32) & _WORD) ^ fourth ^ high_key, product & _WORD)
        low_key, high_key = (low_key + 0x9E3779B9) & _WORD, (high_key + 0xBB67AE85) & _WORD
    return first, second, third, fourth
