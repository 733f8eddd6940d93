"""One micro-batch of packed rows on flat real tokens: no padding token is ever present.

t tokens of all rows, g proteins, m chosen tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megatron.data.rows.packed import Row


@dataclass(frozen=True)
class Batch:
    """Rows one behind the other; every protein in a row is [CLS] and its residues."""

    tokens_t: torch.Tensor  # int64 [t], masked input
    positions_t: torch.Tensor  # int64 [t], 0 at each protein's [CLS]
    cu_seqlens: torch.Tensor  # int32 [g + 1], where each protein starts, and t
    target_positions_m: torch.Tensor  # int64 [m], flat indices of the chosen tokens, ascending
    target_ids_m: torch.Tensor  # int64 [m], the ids that stood there
    lengths: tuple[int, ...]  # tokens of each protein on the host; they sum to t
    num_residues: int  # tokens that are not [CLS]
    num_positions: int  # rows x sequence length

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles tensors as plain bytes: a shared-memory file each, torch's way, costs four times as much a row."""
        values = (getattr(self, item.name) for item in fields(self))
        return _from_arrays, tuple(value.numpy() if isinstance(value, torch.Tensor) else value for value in values)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies that do not block."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(self, tokens_t=function(self.tokens_t), positions_t=function(self.positions_t),
                       cu_seqlens=function(self.cu_seqlens), target_ids_m=function(self.target_ids_m),
                       target_positions_m=function(self.target_positions_m))


def _from_arrays(*values: Any) -> Batch:
    as_given: list[Any] = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    return Batch(*as_given)


def collate(rows: Sequence[Row], seq_length: int) -> Batch:
    """The batch of some rows, in their order; of none, a batch without tokens."""
    lengths = _join([row.lengths for row in rows])
    protein_starts = np.concatenate([[0], np.cumsum(lengths)])
    num_tokens = int(protein_starts[-1])
    row_starts = np.cumsum([0, *(len(row.tokens_t) for row in rows)])
    target_positions = [row.target_positions_m + start for row, start in zip(rows, row_starts, strict=False)]
    positions = np.arange(num_tokens) - np.repeat(protein_starts[:-1], lengths)
    return Batch(
        tokens_t=torch.from_numpy(_join([row.tokens_t for row in rows])),
        positions_t=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(protein_starts.astype(np.int32)),
        target_positions_m=torch.from_numpy(_join(target_positions)),
        target_ids_m=torch.from_numpy(_join([row.target_ids_m for row in rows])),
        lengths=tuple(lengths.tolist()),
        num_residues=num_tokens - len(lengths),
        num_positions=len(rows) * seq_length,
    )


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays one behind the other as int64; of none, an empty one."""
    return np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64, casting="same_kind")
