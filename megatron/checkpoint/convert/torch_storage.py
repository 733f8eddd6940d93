"""Tensors in a file as torch.save lays them: a storage is one run of numbers, a tensor a strided view of it."""

import math
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, StoredTensor, one_piece
from megatron.errors import CheckpointError


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


@dataclass(frozen=True)
class _View:
    """Reads a box of a tensor. Equal for equal views of one storage, as torch.save writes parameters that are tied."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    strides: tuple[int, ...]

    def __call__(self, box: Box) -> Tensor:
        """The box, by way of all that lies in the file from its first number to its last."""
        sizes = [part.stop - part.start for part in box]
        if not math.prod(sizes):
            return torch.empty(sizes, dtype=self.dtype)
        first = self.offset + sum(part.start * stride for part, stride in zip(box, self.strides, strict=True))
        count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True))
        span = torch.empty(count, dtype=self.dtype)
        self.storage.read(span, first, self.dtype)
        # A dimension of one number may have any stride, with which the last one could not be seen as bytes.
        used = [stride if size > 1 else 1 for size, stride in zip(sizes, self.strides, strict=True)]
        return span.as_strided(sizes, used).contiguous()


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
    return one_piece(shape, dtype, _View(storage, dtype, offset, tuple(strides)))
