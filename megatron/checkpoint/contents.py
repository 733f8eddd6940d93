"""What a checkpoint is, whatever its format: a table of tensors that are read when they are asked for, and facts.

A reader of a format gives a `Checkpoint`; loading, converting and inspecting take one.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.errors import CheckpointError

Box = tuple[slice, ...]
SAMPLE = 256  # numbers of a tensor's middle row that are compared between hosts


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
        return self.read_box(tuple(slice(0, size) for size in self.shape))

    def read_box(self, box: Box) -> Tensor:
        """A box of the whole, on the CPU; raises CheckpointError where its pieces leave a hole, or overlap."""
        begin, sizes = [part.start for part in box], [part.stop - part.start for part in box]
        out, copied = torch.empty(0, dtype=self.dtype), list[tuple[list[int], torch.Size]]()
        for piece in self.pieces:
            common = tuple(slice(max(here.start, there.start), min(here.stop, there.stop))
                           for here, there in zip(box, piece.box, strict=True))
            if any(part.start >= part.stop for part in common):
                continue
            if common == box:
                return piece.read(_from(piece.offsets, common))
            if not copied:
                out = torch.empty(sizes, dtype=self.dtype)
            place = _from(begin, common)
            out[place] = piece.read(_from(piece.offsets, common))
            copied.append(([part.start for part in place], out[place].shape))
        if not are_a_whole(copied, sizes):
            raise CheckpointError(f"a tensor {list(self.shape)} of the checkpoint is damaged: its pieces do not make "
                                  f"up the {prod(sizes)} numbers from {begin} on; copy it again")
        return out.reshape(sizes)

    def part(self, box: Box) -> "StoredTensor":
        """A box of the whole, yet to be read."""
        return one_piece([part.stop - part.start for part in box], self.dtype,
                         lambda inner: self.read_box(_from([-part.start for part in box], inner)))

    def to(self, dtype: torch.dtype) -> "StoredTensor":
        """The same in another kind of numbers, yet to be read."""
        return self if dtype == self.dtype else one_piece(self.shape, dtype, lambda box: self.read_box(box).to(dtype))


Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run, or weights from elsewhere, with every tensor under our names.

    `model`: the parameters' whole values. `optimizer`: state tensors as KIND/PARAMETER (`exp_avg/lm_head.bias`; the
    count of steps, a scalar, as `step/lm_head.bias`), None where there is none. `state`: what else is known, of
    "progress" {"iteration", "consumed_samples"}, "schedule", "loss_scale", "config" (flags by their fields' names) and
    "is_averaged", where the weights are an average.
    `path`: where it lies, for messages. `average`: that of the trained parameters, by their names, of a run with --ema.
    """

    path: Path
    iteration: int
    model: Tensors
    optimizer: Tensors | None
    state: dict[str, Any]
    average: Tensors | None = None

    def mapped(self, function: Callable[[str, StoredTensor], StoredTensor]) -> "Checkpoint":
        """The same with `function(name, tensor)` in the place of each tensor; `name`: as in its table."""
        model, optimizer, average = (
            None if tensors is None else {name: function(name, tensor) for name, tensor in tensors.items()}
            for tensors in (self.model, self.optimizer, self.average))
        return replace(self, model=model or {}, optimizer=optimizer, average=average)

    def averaged(self) -> "Checkpoint":
        """The same with the average as the weights, and nothing of the optimizer; raises CheckpointError where there
        is none."""
        if self.average is None:
            raise CheckpointError(f"{self.path} holds no average of the weights, which a run with --ema saves; leave "
                                  "--load-ema out")
        return replace(self, model={**self.model, **self.average}, optimizer=None, average=None,
                       state=self.state | {"is_averaged": True})


def content_of(checkpoint: Checkpoint | None) -> Any:
    """What tells a checkpoint from another one at the same place on another host, as JSON; None for none.

    It is when a run wrote it. Weights of other programs do not say that: then it is a digest of the names, shapes and
    some numbers of all of them.
    """
    if checkpoint is None or "written_s" in checkpoint.state:
        return checkpoint and checkpoint.state["written_s"]
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(checkpoint.model.items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        box = tuple(slice(size // 2, min(size // 2 + SAMPLE, size)) if dim == len(tensor.shape) - 1 else
                    slice(size // 2, size // 2 + 1) for dim, size in enumerate(tensor.shape))
        digest.update(tensor.read_box(box).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from(offsets: Sequence[int], box: Box) -> Box:
    """The same place, counted from `offsets` on."""
    return tuple(slice(part.start - offset, part.stop - offset) for part, offset in zip(box, offsets, strict=True))


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor in memory, as if it were stored."""
    return one_piece(tensor.shape, tensor.dtype, lambda box: tensor.detach()[box].cpu().clone())


def one_piece(shape: Sequence[int], dtype: torch.dtype, read: Callable[[Box], Tensor]) -> StoredTensor:
    """A tensor that lies in one place."""
    return StoredTensor(tuple(shape), dtype, (Piece((0,) * len(shape), tuple(shape), read),))


def joined(parts: Sequence[StoredTensor], dim: int | None) -> StoredTensor:
    """The parts of a tensor that ranks have, all of one shape, one behind another along `dim`.

    The first of them where each rank has the whole: where `dim` is None, or none of its dimensions.
    """
    first = parts[0]
    if dim is None or len(parts) == 1 or dim >= len(first.shape):
        return first
    size = first.shape[dim]
    whole = tuple(len(parts) * length if at == dim else length for at, length in enumerate(first.shape))
    return StoredTensor(whole, first.dtype, tuple(
        Piece(tuple(rank * size if at == dim else 0 for at in range(len(whole))), part.shape, part.read_box)
        for rank, part in enumerate(parts)))


def are_a_whole(boxes: Iterable[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int]) -> bool:
    """Whether boxes, of offsets and sizes each, make up a tensor of that shape, each element once."""
    # A box is known by its corners, each with a sign; where all cancel those of the whole, the boxes are the whole.
    corners = Counter[tuple[int, ...]]()
    for sign, offsets, sizes in [(1, *box) for box in boxes] + [(-1, [0] * len(shape), shape)]:
        for ends in product((0, 1), repeat=len(shape)):
            corner = tuple(start + end * size for start, end, size in zip(offsets, ends, sizes, strict=True))
            corners[corner] += -sign if sum(ends) % 2 else sign
    return not any(corners.values())


def split(whole: StoredTensor, dim: int | None, rank: int, num_ranks: int) -> StoredTensor:
    """What `joined` makes the whole of: the part that a rank has, of as many as divide its dimension `dim`."""
    if dim is None or num_ranks == 1:
        return whole
    size = whole.shape[dim] // num_ranks
    return whole.part(tuple(slice(rank * size, (rank + 1) * size) if at == dim else slice(0, length)
                            for at, length in enumerate(whole.shape)))
