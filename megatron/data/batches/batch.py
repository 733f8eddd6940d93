"""One micro-batch of packed rows on flat tokens, of one shape whatever lies in the rows.

t tokens of all rows, g proteins, m chosen tokens.
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
    """How large every micro-batch of a run is, and which of `num_shares` equal shares of its tokens this rank takes."""

    num_tokens: int  # rows x sequence length, evened up to what the layout divides
    num_proteins: int  # a micro-batch of more is padded to twice as many, or four times
    num_targets: int  # likewise
    max_length: int  # tokens of the longest protein
    share: int = 0
    num_shares: int = 1
    num_ends: int = 1  # tokens of each protein that are no residues

    @property
    def num_filler(self) -> int:
        """Segments that the filler is cut into."""
        return -(-self.num_tokens // self.max_length)


def batch_shape(splits: Splits, micro_batch_size: int, token_multiple: int = 1, share: int = 0, num_shares: int = 1,
                start_sample: int = 0) -> BatchShape:
    """The shape of all micro-batches of a run that starts at `start_sample`, by the row indices it begins with.

    They have a multiple of `token_multiple` tokens. Those of an evaluation differ in their targets.
    """
    evaluated = [part for part in (splits.valid, splits.test) if part is not None]
    parts = [splits.train, *evaluated]
    num_tokens = micro_batch_size * splits.train.seq_length
    proteins = max(splits.train.most_proteins(micro_batch_size, start_sample),
                   *(part.most_proteins(micro_batch_size) for part in evaluated), 0)
    return BatchShape(
        num_tokens=num_tokens + -num_tokens % token_multiple,
        num_proteins=proteins + proteins // 4 + 8,  # those of an epoch; others differ a little
        num_targets=splits.train.most_targets(micro_batch_size),
        max_length=max(part.longest() for part in parts), share=share, num_shares=num_shares,
        num_ends=splits.train.num_ends)


@dataclass(frozen=True)
class Batch:
    """Rows one behind the other, and what is known of them on the host; the counts are of the whole micro-batch."""

    sequence: PackedSequence
    targets: Any  # Targets, or what else the model's last stage takes beside hidden states, with a `map` as they have
    num_targets: int  # what the loss is a sum over
    num_residues: int  # tokens that are neither ends of proteins nor filler
    num_tokens: int  # tokens that are no filler
    num_pairs: int  # tokens that see each other: the sum of the squares of the proteins' tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles tensors as plain bytes: a shared-memory file each, torch's way, costs four times as much a row."""
        tensors = (*self.sequence.tensors(), *self.targets.tensors())
        numbers = (self.sequence.max_length, self.sequence.num_filler, self.num_targets, self.num_residues,
                   self.num_tokens, self.num_pairs)
        return _from_arrays, ([tensor.numpy() for tensor in tensors], *numbers)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; does not wait for copies from page-locked memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def without_filler(self, token_multiple: int) -> "Batch":
        """The same batch, whole and on the host, with no more filler than a multiple of tokens takes."""
        size = max(self.num_tokens + -self.num_tokens % token_multiple, token_multiple)
        sequence = replace(self.sequence, tokens_t=self.sequence.tokens_t[:size],
                           positions_t=self.sequence.positions_t[:size],
                           cu_seqlens=self.sequence.cu_seqlens.clamp(max=size))
        return replace(self, sequence=sequence)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies that do not block."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, sequence=self.sequence.map(function), targets=self.targets.map(function))


def _from_arrays(arrays: Sequence[np.ndarray], max_length: int, num_filler: int, *counts: int) -> Batch:
    tokens_t, positions_t, cu_seqlens, seed, target_positions_m, ids_m = map(torch.from_numpy, arrays)
    return Batch(PackedSequence(tokens_t, positions_t, cu_seqlens, max_length, num_filler, seed),
                 Targets(target_positions_m, ids_m), *counts)


def collate(rows: Sequence[Row], shape: BatchShape, seed: int = 0) -> Batch:
    """The batch of some rows, in their order; of none, a batch of filler alone. `seed`: of its dropout."""
    lengths = _join([row.lengths for row in rows])
    ends = np.cumsum(lengths)
    num_tokens, num_targets = int(lengths.sum()), sum(len(row.target_ids_m) for row in rows)
    assert num_tokens <= shape.num_tokens, "rows are not longer than they are said to be"
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
    """int32: 0, the end of each protein, the end of the last again and again, and the ends of the filler's segments."""
    num_proteins = _doubled(shape.num_proteins, len(ends))
    filler = num_tokens + shape.max_length * np.arange(1, shape.num_filler + 1)
    ends = np.concatenate([[0], _padded(ends, num_proteins, num_tokens), np.minimum(filler, shape.num_tokens)])
    return ends.astype(np.int32)


def _doubled(size: int, least: int) -> int:
    """`size`, doubled until it is `least`."""
    while size < least:
        size *= 2
    return size


def _padded(values: np.ndarray, size: int, filler: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - len(values), filler, values.dtype)])


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays one behind the other as int64; of none, an empty one."""
    return np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64, casting="same_kind")
