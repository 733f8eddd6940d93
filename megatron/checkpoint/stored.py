"""What a checkpoint is, whatever its format: a table of tensors that are read when they are asked for, and facts.

A reader of a format gives a `Checkpoint`; loading, converting and inspecting take one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a stored tensor, as one file holds it.

    `offsets`: where in the whole it begins; `read` gives a part of it, a box within the piece, on the CPU and
    contiguous, in memory that no other reading gives.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]

    @property
    def box(self) -> Box:
        """Its place in the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.shape, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor on the disk: what it is, and the pieces that make it up, none of which overlap."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """The whole, on the CPU."""
        if len(self.pieces) == 1:
            return self.pieces[0].read(self.pieces[0].box)
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            whole[piece.box] = piece.read(tuple(slice(0, size) for size in piece.shape))
        return whole


Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run, or weights from elsewhere, with every tensor under our names.

    `model`: the parameters' whole values. `optimizer`: state tensors as KIND/PARAMETER (`exp_avg/lm_head.bias`; the
    count of steps, a scalar, as `step/lm_head.bias`), None where there is none. `state`: what else is known, of
    "progress" {"iteration", "consumed_samples"}, "schedule", "loss_scale" and "config" (flags by their fields' names).
    `path`: where it lies, for messages.
    """

    path: Path
    iteration: int
    model: Tensors
    optimizer: Tensors | None
    state: dict[str, Any]


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor in memory, as if it were stored."""
    return one_piece(tensor.shape, tensor.dtype, lambda box: tensor.detach()[box].cpu().clone())


def one_piece(shape: Sequence[int], dtype: torch.dtype, read: Callable[[Box], Tensor]) -> StoredTensor:
    """A tensor that lies in one place."""
    return StoredTensor(tuple(shape), dtype, (Piece((0,) * len(shape), tuple(shape), read),))
