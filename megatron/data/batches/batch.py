"""Makes micro-batches: packed rows as one flat sequence of tokens, padded to the same shape whatever the rows contain.

Shapes: t tokens of all rows, g proteins, m targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.data.rows.dataset import Splits
from megatron.data.rows.packed import Row
from megatron.kernels.packed_sequence import NO_TARGET, PackedSequence, Targets


@dataclass(frozen=True)
class BatchShape:
    """The size of every micro-batch of a run, and this rank's share of its tokens."""

    num_tokens: int  # rows x sequence length, rounded up to a multiple that the layout needs
    num_proteins: int  # padded to this number; a micro-batch with more is padded to 2, 4, ... times as many
    num_targets: int  # padded in the same way
    max_length: int  # tokens of the longest protein
    share: int = 0  # the index of this rank's share of the tokens
    num_shares: int = 1  # how many equal shares there are
    num_ends: int = 1  # special tokens of each protein

    @property
    def num_filler(self) -> int:
        """The number of segments that the filler is divided into."""
        return -(-self.num_tokens // self.max_length)


def batch_shape(splits: Splits, micro_batch_size: int, token_multiple: int = 1, share: int = 0, num_shares: int = 1,
                start_sample: int = 0) -> BatchShape:
    """The shape of all micro-batches of a run that starts at `start_sample`, by the row indices of the epochs there.

    The number of tokens is a multiple of `token_multiple`. `num_targets` is for training; evaluation replaces it.
    """
    evaluated = [part for part in (splits.valid, splits.test) if part is not None]
    parts = [splits.train, *evaluated]
    num_tokens = micro_batch_size * splits.train.seq_length
    proteins = max(splits.train.most_proteins(micro_batch_size, start_sample),
                   *(part.most_proteins(micro_batch_size) for part in evaluated), 0)
    return BatchShape(
        num_tokens=num_tokens + -num_tokens % token_multiple,
        num_proteins=proteins + proteins // 4 + 8,  # room for other epochs, which differ a little
        num_targets=splits.train.most_targets(micro_batch_size),
        max_length=max(part.longest() for part in parts), share=share, num_shares=num_shares,
        num_ends=splits.train.num_ends)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows concatenated, with counts on the host of the whole micro-batch, not only this rank's share.
    """

    sequence: PackedSequence
    targets: Any  # Targets, or another input of the model's last stage that has the methods `map` and `tensors`
    num_targets: int  # terms of the loss
    num_residues: int  # tokens without special tokens and filler
    num_tokens: int  # tokens without filler
    num_pairs: int  # pairs of tokens that attend to each other: the sum of the squared protein lengths

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles tensors as plain bytes, four times as fast as torch's way, a shared-memory file for each tensor."""
        tensors = (*self.sequence.tensors(), *self.targets.tensors())
        numbers = (self.sequence.max_length, self.sequence.num_filler, self.num_targets, self.num_residues,
                   self.num_tokens, self.num_pairs)
        return _from_arrays, ([tensor.numpy() for tensor in tensors], *numbers)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; copies from page-locked memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def without_filler(self, token_multiple: int) -> "Batch":
        """The batch with only as much filler as makes its tokens a multiple; it must be a whole one, on the host."""
        size = max(self.num_tokens + -self.num_tokens % token_multiple, token_multiple)
        sequence = replace(self.sequence, tokens_t=self.sequence.tokens_t[:size],
                           positions_t=self.sequence.positions_t[:size],
                           cu_seqlens=self.sequence.cu_seqlens.clamp(max=size))
        return replace(self, sequence=sequence)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for asynchronous copies."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, sequence=self.sequence.map(function), targets=self.targets.map(function))


def _from_arrays(arrays: Sequence[np.ndarray], max_length: int, num_filler: int, *counts: int) -> Batch:
    tokens_t, positions_t, cu_seqlens, seed, target_positions_m, ids_m = map(torch.from_numpy, arrays)
    return Batch(PackedSequence(tokens_t, positions_t, cu_seqlens, max_length, num_filler, seed),
                 Targets(target_positions_m, ids_m), *counts)


def collate(rows: Sequence[Row], shape: BatchShape, seed: int = 0) -> Batch:
    """The batch of some rows, in order; only filler if there are none. `seed`: of its dropout."""
    lengths = _join([row.lengths for row in rows])
    ends = np.cumsum(lengths)
    num_tokens, num_targets = int(lengths.sum()), sum(len(row.target_ids_m) for row in rows)
    assert num_tokens <= shape.num_tokens, "rows fit into the shape"
    row_starts = np.cumsum([0, *(len(row.tokens_t) for row in rows)])
    tokens, positions = np.zeros((2, shape.num_tokens), np.int64)
    tokens[:num_tokens] = _join([row.tokens_t for row in rows])
    positions[:num_tokens] = np.arange(num_tokens) - np.repeat(ends - lengths, lengths)
    target_positions = _join([row.target_positions_m + start for row, start in zip(rows, row_starts, strict=False)])
    target_ids = _join([row.target_ids_m for row in rows])
    here = slice(shape.share * shape.num_tokens // shape.num_shares,
                 (shape.share + 1) * shape.num_tokens // shape.num_shares)
    first, last = np.searchsorted(target_positions, (here.start, here.stop))
    size = min(_doubled(shape.num_targets, num_targets), here.stop - here.start)
    arrays = [tokens[here], positions[here], _boundaries(ends, num_tokens, shape), np.array(seed),
              _padded(target_positions[first:last] - here.start, size, 0),
              _padded(target_ids[first:last], size, NO_TARGET)]
    return _from_arrays(arrays, shape.max_length, shape.num_filler, num_targets,
                        num_tokens - shape.num_ends * len(lengths), num_tokens, int((lengths**2).sum()))


def _boundaries(ends: np.ndarray, num_tokens: int, shape: BatchShape) -> np.ndarray:
    """The boundaries `cu_seqlens`, int32: 0, each protein's end, the last end repeated as padding, ends of the filler.
    """
    num_proteins = _doubled(shape.num_proteins, len(ends))
    filler = num_tokens + shape.max_length * np.arange(1, shape.num_filler + 1)
    ends = np.concatenate([[0], _padded(ends, num_proteins, num_tokens), np.minimum(filler, shape.num_tokens)])
    return ends.astype(np.int32)


def _doubled(size: int, least: int) -> int:
    """`size`, doubled until it is at least `least`."""
    while size < least:
        size *= 2
    return size


def _padded(values: np.ndarray, size: int, filler: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - len(values), filler, values.dtype)])


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays concatenated, int64; an empty array for none."""
    return np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64, casting="same_kind")
