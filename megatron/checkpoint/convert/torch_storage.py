"""Tensors in a file as torch.save lays them: a storage is one run of numbers, a tensor a strided view of it."""

import math
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.stored import Box, StoredTensor, one_piece
from megatron.errors import CheckpointError

_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StorageType:
    """What the elements of a storage are."""

    dtype: torch.dtype


@dataclass
class Storage:
    """`num_elements` numbers in a file from `begin` on; where the file says so, `crc32` is the checksum of all."""

    path: Path
    dtype: torch.dtype
    num_elements: int
    begin: int
    crc32: int | None = None

    def read(self, out: Tensor, first: int, dtype: torch.dtype) -> None:
        """Fill a contiguous tensor with the numbers from `first` on; raises CheckpointError for damage."""
        if not out.numel():
            return
        data = out.view(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin + first * dtype.itemsize)
                num_bytes = file.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        if num_bytes != len(data):
            raise CheckpointError(f"{self.path}: ends within a tensor; it was cut off, copy it again")
        is_whole = len(data) == self.num_elements * self.dtype.itemsize
        if is_whole and self.crc32 is not None and zlib.crc32(data) != self.crc32:
            raise CheckpointError(f"{self.path}: damaged, a tensor's checksum is not that of what was written; copy it "
                                  "again")


def view(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """The tensor that a pickle describes; raises pickle.UnpicklingError where it is not within its storage."""
    numbers = (offset, *shape, *strides)
    if (not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype) or len(shape) != len(strides)
            or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers)):
        raise pickle.UnpicklingError("it describes a tensor by what is not its offset, shape and strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    room = storage.num_elements * storage.dtype.itemsize // dtype.itemsize
    if math.prod(shape) and (last >= room or math.prod(shape) > room):
        raise pickle.UnpicklingError(f"it describes a tensor of {list(shape)} numbers, strides {list(strides)} from "
                                     f"{offset} on, which is more than its storage of {room} holds")
    contiguous = torch.empty(shape, device="meta").stride()
    if math.prod(shape) and any(size > 1 and stride != expected
                                for size, stride, expected in zip(shape, strides, contiguous, strict=True)):
        return one_piece(shape, dtype, lambda box: _read_strided(storage, dtype, offset, shape, strides, box))
    return one_piece(shape, dtype, lambda box: _read_rows(storage, dtype, offset, shape, box))


def _read_rows(storage: Storage, dtype: torch.dtype, offset: int, shape: Sequence[int], box: Box) -> Tensor:
    """A box of a contiguous tensor, by no more memory than it takes and a block besides."""
    out = torch.empty([part.stop - part.start for part in box], dtype=dtype)
    row_size = math.prod(shape[1:])
    first, last = (box[0].start, box[0].stop) if box else (0, 1)
    if tuple(out.shape[1:]) == tuple(shape[1:]):
        storage.read(out, offset + first * row_size, dtype)
        return out
    columns = (slice(None), *box[1:])
    step = max(1, _BLOCK_BYTES // max(1, row_size * dtype.itemsize))
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        storage.read(rows, offset + start * row_size, dtype)
        out[start - first:stop - first] = rows[columns]
    return out


def _read_strided(storage: Storage, dtype: torch.dtype, offset: int, shape: Sequence[int], strides: Sequence[int],
                  box: Box) -> Tensor:
    first = offset + sum(part.start * stride for part, stride in zip(box, strides, strict=True))
    sizes = [part.stop - part.start for part in box]
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=dtype)
    span = torch.empty(1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)), dtype=dtype)
    storage.read(span, first, dtype)
    return span.as_strided(sizes, list(strides)).clone(memory_format=torch.contiguous_format)
